//! What the suites of the datapath have in common: packets, a host to run the forwarding core on,
//! the loaded kernel programs, and the journeys that both of them take.

pub mod device;
pub mod fuzz;
pub mod host;
pub mod journeys;
pub mod kernel;
pub mod offload;
pub mod packet;
pub mod pair;
pub mod random;
pub mod ranges;
pub mod seen;
pub mod skb;
pub mod sockets;
pub mod tables;
pub mod taps;
pub mod twins;
pub mod verified;
pub mod view;
pub mod world;
