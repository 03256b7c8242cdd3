// What a model says of one image, and when it says nothing.
#pragma once

#include "artifact.hpp"

namespace invariclip {

// The uncertainty above which no label is given, or none. Throws InputError where it is no uncertainty, the artifact
// has no learned templates, or they were not calibrated.
std::optional<double> threshold(const Facts& facts, const Abstain& abstain);

// The best classes of a row of probabilities, best first; of equal ones, the larger logit comes first, then the first.
Prediction ranked(const float* row, const float* logits, const std::vector<std::string>& classes, std::size_t top_k);

// What unit embeddings [rows, facts.width] say of unit class embeddings [facts.width, classes], in float64: the softmax
// of τ · cos, or where there is a bias the sigmoid of τ · cos + b; and the logits themselves. Writes
// [rows, classes] of each.
void class_probabilities(const Facts& facts, const std::vector<float>& bank, std::size_t classes,
                         const float* embeddings, std::size_t rows, float* probabilities, float* logits);

}  // namespace invariclip
