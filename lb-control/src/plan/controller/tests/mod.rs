mod life;
mod nodes;
mod properties;
mod server;
mod world;

use world::{Fault, World};
