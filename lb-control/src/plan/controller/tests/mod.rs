mod costs;
mod life;
mod nodes;
mod properties;
mod scenarios;
mod server;
mod unreadable;
mod world;

use world::{Fault, World};
