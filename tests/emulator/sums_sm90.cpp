#define HEDDLE_DV 0
#include "slots_sm90.cpp"
