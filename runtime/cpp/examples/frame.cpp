// One frame from memory, as a camera or OpenCV has it: with cv::Mat it is
//     invariclip::Image{mat.data, mat.cols, mat.rows, mat.step, invariclip::Order::bgr}
#include <invariclip/invariclip.hpp>
#include <iostream>
#include <vector>

int main(int count, char** arguments) {
    if (count != 2) {
        std::cerr << "usage: invariclip-frame ARTIFACT\n";
        return 2;
    }
    try {
        const auto model = invariclip::Model::load(arguments[1]);
        model.warm_up();
        const int width = 640;
        const int height = 480;
        std::vector<unsigned char> frame(width * height * 3, 127);
        const invariclip::Image image{frame.data(), width, height, width * 3, invariclip::Order::bgr};
        const invariclip::Prediction answer = model.classify(image).front();
        std::cout << answer.label.value_or("not sure") << ' ' << answer.probability << '\n';
    } catch (const invariclip::Error& error) {
        std::cerr << error.what() << '\n';
        return 2;
    }
    return 0;
}
