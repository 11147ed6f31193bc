mod life;
mod server;
mod world;

use world::World;
