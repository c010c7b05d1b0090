//! Tests of the driver as a whole.
