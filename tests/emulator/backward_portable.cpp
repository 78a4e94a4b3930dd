#define HEDDLE_PORTABLE true
#include "backward_sm90.cpp"
