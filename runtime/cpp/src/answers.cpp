#include "answers.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace invariclip {

std::optional<double> threshold(const Facts& facts, const Abstain& abstain) {
    if (abstain.kind() == Abstain::Kind::never) {
        return std::nullopt;
    }
    if (!facts.learned) {
        throw InputError(
            "the artifact has no learned templates, so its answers have no uncertainty; train some with "
            "`invariclip cdc` and export again with --cdc FILE");
    }
    if (abstain.kind() == Abstain::Kind::calibrated) {
        if (!facts.abstain_above) {
            throw InputError(
                "the artifact's templates were not calibrated for a risk; give a number from 0 to 1, or train "
                "with `invariclip cdc --target-risk R` and export again");
        }
        return facts.abstain_above;
    }
    if (!(abstain.uncertainty() >= 0 && abstain.uncertainty() <= 1)) {
        throw InputError("the uncertainty to abstain above must be a number from 0 to 1, not " +
                         std::to_string(abstain.uncertainty()));
    }
    return abstain.uncertainty();
}

void class_probabilities(const Facts& facts, const std::vector<float>& bank, std::size_t classes,
                         const float* embeddings, std::size_t rows, float* probabilities, float* kept) {
    std::vector<double> logits(classes);
    for (std::size_t row = 0; row < rows; ++row, embeddings += facts.width, probabilities += classes, kept += classes) {
        std::fill(logits.begin(), logits.end(), 0.0);
        for (std::size_t place = 0; place < facts.width; ++place) {
            const auto value = static_cast<double>(embeddings[place]);
            const float* weights = bank.data() + place * classes;
            for (std::size_t one = 0; one < classes; ++one) {
                logits[one] += value * static_cast<double>(weights[one]);
            }
        }
        for (double& logit : logits) {
            logit = facts.logit_scale * logit + facts.logit_bias.value_or(0);
        }
        std::transform(logits.begin(), logits.end(), kept, [](double logit) { return static_cast<float>(logit); });
        if (facts.logit_bias) {
            std::transform(logits.begin(), logits.end(), probabilities, [](double logit) {
                // the sigmoid; it cannot overflow, and weak classes keep their order
                const double small = std::exp(-std::abs(logit));
                return static_cast<float>((logit < 0 ? small : 1.0) / (1 + small));
            });
            continue;
        }
        const double most = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (double& logit : logits) {
            logit = std::exp(logit - most);
            sum += logit;
        }
        std::transform(logits.begin(), logits.end(), probabilities,
                       [sum](double weight) { return static_cast<float>(weight / sum); });
    }
}

Prediction ranked(const float* row, const float* logits, const std::vector<std::string>& classes, std::size_t top_k) {
    Prediction made;
    made.probabilities.assign(row, row + classes.size());
    std::vector<std::size_t> order(classes.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto known = [](float logit) { return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit; };
    const auto better = [row, logits, known](std::size_t one, std::size_t other) {  // what is no number comes last
        if (std::isnan(row[one]) || std::isnan(row[other])) {
            return std::isnan(row[one]) == std::isnan(row[other]) ? one < other : std::isnan(row[other]);
        }
        if (row[one] != row[other]) {
            return row[one] > row[other];
        }
        const float mine = known(logits[one]);
        const float theirs = known(logits[other]);
        return mine != theirs ? mine > theirs : one < other;
    };
    const auto kept = static_cast<std::ptrdiff_t>(std::min(top_k, order.size()));
    std::partial_sort(order.begin(), order.begin() + kept, order.end(), better);
    order.resize(static_cast<std::size_t>(kept));
    for (const std::size_t place : order) {
        made.ranking.push_back({classes[place], row[place]});
    }
    made.index = order.front();
    made.probability = row[made.index];
    return made;
}

}  // namespace invariclip
