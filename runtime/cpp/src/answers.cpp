#include "answers.hpp"

#include <algorithm>
#include <cmath>
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

Prediction ranked(const float* row, const std::vector<std::string>& classes, std::size_t top_k) {
    Prediction made;
    made.probabilities.assign(row, row + classes.size());
    std::vector<std::size_t> order(classes.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto better = [row](std::size_t one, std::size_t other) {  // what is no number comes last
        if (std::isnan(row[one]) || std::isnan(row[other])) {
            return std::isnan(row[one]) == std::isnan(row[other]) ? one < other : std::isnan(row[other]);
        }
        return row[one] != row[other] ? row[one] > row[other] : one < other;
    };
    const auto kept = static_cast<std::ptrdiff_t>(std::min(top_k, order.size()));
    std::partial_sort(order.begin(), order.begin() + kept, order.end(), better);
    order.resize(static_cast<std::size_t>(kept));
    for (const std::size_t place : order) {
        made.ranking.emplace_back(classes[place], row[place]);
    }
    made.index = order.front();
    made.probability = row[made.index];
    return made;
}

}  // namespace invariclip
