#define HEDDLE_PORTABLE true
#include "decode_sm90.cpp"
