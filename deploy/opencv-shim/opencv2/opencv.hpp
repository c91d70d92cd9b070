// Stands in for OpenCV's umbrella header, which is only in the package that pulls in all of OpenCV (216 packages).
// FFCV needs core and imgproc.
#pragma once
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
