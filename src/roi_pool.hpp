#pragma once
#include "roi_backward.hpp"
#include "roi_forward.hpp"
