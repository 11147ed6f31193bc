//! Against the kernel, in network namespaces of each test's own.

mod addresses;
mod next_hops;
