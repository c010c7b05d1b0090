//! The laws as library functions: every driver calls them from its tests.
