//! What has to be right before the agent begins.

use anyhow::{Context, Result, bail};
use lb_common::abi::Config;

use super::Settings;
use crate::dataplane::{Kernel as Programs, KernelMaps, PinDirectory};
use crate::net::Kernel as Network;
use crate::plan::{self, Compiler, CookiePhase, CookiePolicy};
use crate::ports::MapStore;

/// What the kernel has of the agent from its first moment.
pub struct Loaded {
    /// Attached nowhere yet, unless by an earlier agent.
    pub programs: Programs,
    /// Those that are pinned.
    pub maps: KernelMaps,
    /// It knows what is in the maps.
    pub compiler: Compiler,
    /// The settings of the datapath to begin with; not written yet.
    pub config: Config,
    /// Whether SYN cookies are in use.
    pub cookies: CookiePhase,
}

/// Loads the programs over the maps that there are, or makes both.
///
/// # Errors
/// When the kernel refuses, or a setting is no good. Nothing was attached or written then, but maps may
/// have been made.
pub fn load(pins: &PinDirectory, settings: &Settings) -> Result<Loaded> {
    let programs = Programs::load(pins, &settings.sizes)?;
    let maps = KernelMaps::from_pins(pins)?;
    let compiler = Compiler::adopt(&maps, plan::Settings::default())?;
    // Whatever the maps say, next hops may be others by now.
    let earlier = maps.config()?;
    let cookies = first_cookies(settings.syn_cookies, earlier.as_ref());
    let config = first_config(settings, earlier)?;
    Ok(Loaded { programs, maps, compiler, config, cookies })
}

/// Looks at what can be known to be wrong before anything is touched.
///
/// # Errors
/// When a setting is no good, or the link device is not there.
pub async fn check(settings: &Settings) -> Result<()> {
    first_config(settings, None)?;
    check_device(&Network::connect()?, &settings.link_device).await
}

/// Refuses to begin without the link device, and says which there are.
pub async fn check_device(network: &Network, name: &str) -> Result<()> {
    let links = network.links().await?;
    if links.values().any(|link| link.name == name) {
        return Ok(());
    }
    let others: Vec<_> =
        links.values().filter(|link| !link.is_loopback).map(|link| link.name.as_str()).collect();
    bail!("--link-device {name}: there is no such device; this node has: {}", others.join(", "))
}

/// The settings of the datapath to begin with. The route generation goes on where an earlier agent
/// stopped: its flows carry it.
pub fn first_config(settings: &Settings, earlier: Option<Config>) -> Result<Config> {
    let (first, last) = settings.snat_ports;
    let count = last
        .checked_sub(first)
        .and_then(|count| count.checked_add(1))
        .filter(|_| first > 0)
        .with_context(|| {
            format!("--snat-ports {first}-{last}: the first port must be at least 1 and not above the last")
        })?;
    let generation = earlier.map_or(0, |config| config.route_generation).wrapping_add(1).max(1);
    Ok(Config {
        route_generation: generation,
        snat_port_first: first,
        snat_port_count: count,
        ..Config::default()
    })
}

/// What the datapath is to do about SYN cookies to begin with. Left to the agent, it goes on with what an
/// earlier one did: an agent that is restarted in a flood does not let it in.
pub fn first_cookies(policy: CookiePolicy, earlier: Option<&Config>) -> CookiePhase {
    match policy {
        CookiePolicy::Off => CookiePhase::Off,
        CookiePolicy::Auto => {
            earlier.map_or(CookiePhase::Off, |config| CookiePhase::from_raw(config.syn_cookies))
        }
        CookiePolicy::Always => CookiePhase::Answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_goes_on_with_what_is_in_use() {
        for (raw, phase) in [(0, CookiePhase::Off), (1, CookiePhase::Accept), (2, CookiePhase::Answer)] {
            let earlier = Config { syn_cookies: raw, ..Config::default() };
            assert_eq!(first_cookies(CookiePolicy::Auto, Some(&earlier)), phase);
            assert_eq!(first_cookies(CookiePolicy::Off, Some(&earlier)), CookiePhase::Off);
            assert_eq!(first_cookies(CookiePolicy::Always, Some(&earlier)), CookiePhase::Answer);
        }
        assert_eq!(first_cookies(CookiePolicy::Auto, None), CookiePhase::Off);
    }
}
