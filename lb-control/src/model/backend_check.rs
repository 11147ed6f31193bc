//! How it is found out whether backends work, as an annotation says it.

use std::{fmt, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use super::{ClientAddress, Protocol};

/// What a backend has to do to count as healthy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CheckKind {
    /// To accept a TCP connection.
    Tcp,
    /// To answer a GET request with a status from 200 to 399.
    Http {
        /// Path and query.
        path: String,
        /// What the request says as its `Host`; the backend's own address and port if `None`.
        host: Option<String>,
    },
}

/// How and how often the backends of a Service are asked:
/// `tcp` or `http [/path]`, then any of `port=`, `host=`, `interval=`, `timeout=`, `healthy=`,
/// `unhealthy=`, with blanks between.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendCheck {
    /// What is asked for.
    pub kind: CheckKind,
    /// Where; `None` for the port that the backend serves at.
    pub port: Option<u16>,
    /// From one question to the next.
    pub interval: Duration,
    /// For how long an answer is waited for.
    pub timeout: Duration,
    /// So many good answers in a row make an unhealthy backend a healthy one.
    pub healthy: u8,
    /// So many failures in a row make a healthy backend an unhealthy one.
    pub unhealthy: u8,
}

/// Somebody to ask. Entries that lead to the same place and ask for the same have one in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckTarget {
    /// Where.
    pub address: SocketAddr,
    /// How.
    pub check: Arc<BackendCheck>,
    /// The header that is awaited there ahead of the first byte: that of one of the versions of the PROXY
    /// protocol, or none ([`ClientAddress::Path`]).
    pub header: ClientAddress,
}

impl BackendCheck {
    /// The shortest interval: who asks more often makes traffic of its own.
    pub const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
    /// The longest interval.
    pub const LONGEST_INTERVAL: Duration = Duration::from_secs(300);
    /// The shortest time that a backend is given.
    pub const SHORTEST_TIMEOUT: Duration = Duration::from_millis(10);
    /// The largest number of answers in a row.
    pub const MAXIMUM_IN_A_ROW: u8 = 100;
    /// The longest path or host.
    pub const LONGEST_TEXT: usize = 1_024;

    const INTERVAL: Duration = Duration::from_secs(5);
    const TIMEOUT: Duration = Duration::from_secs(2);

    /// Where a backend is asked; `None` if there is no way to: datagrams are answered by whatever the
    /// server makes of them, so for a UDP port another one has to be named. `clients`: how connections of
    /// clients tell the backend who they are; at its own port it awaits that of everybody.
    #[must_use]
    pub fn target(
        self: &Arc<Self>,
        backend: SocketAddr,
        protocol: Protocol,
        clients: ClientAddress,
    ) -> Option<CheckTarget> {
        let port = match (self.port, protocol) {
            (Some(port), _) => port,
            (None, Protocol::Tcp) => backend.port(),
            (None, _) => return None,
        };
        let header = match clients {
            ClientAddress::ProxyV1 | ClientAddress::ProxyV2 if port == backend.port() => clients,
            _ => ClientAddress::Path,
        };
        Some(CheckTarget { address: SocketAddr::new(backend.ip(), port), check: Arc::clone(self), header })
    }
}

impl fmt::Display for BackendCheck {
    /// As the annotation has it, with all that it may leave out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            CheckKind::Tcp => f.write_str("tcp")?,
            CheckKind::Http { path, host } => {
                write!(f, "http {path}")?;
                if let Some(host) = host {
                    write!(f, " host={host}")?;
                }
            }
        }
        if let Some(port) = self.port {
            write!(f, " port={port}")?;
        }
        let (interval, timeout) = (Span(self.interval), Span(self.timeout));
        write!(
            f,
            " interval={interval} timeout={timeout} healthy={} unhealthy={}",
            self.healthy, self.unhealthy
        )
    }
}

/// A duration as it is written.
struct Span(Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.as_secs(), self.0.subsec_millis()) {
            (seconds, 0) => write!(f, "{seconds}s"),
            _ => write!(f, "{}ms", self.0.as_millis()),
        }
    }
}

/// A check that cannot be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadCheck(String);

impl fmt::Display for BadCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadCheck {}

impl FromStr for BackendCheck {
    type Err = BadCheck;

    fn from_str(text: &str) -> Result<Self, BadCheck> {
        let mut words = text.split_whitespace().peekable();
        let mut check = Self {
            kind: CheckKind::Tcp,
            port: None,
            interval: Self::INTERVAL,
            timeout: Duration::ZERO,
            healthy: 2,
            unhealthy: 3,
        };
        match words.next() {
            Some("tcp") => {}
            Some("http") => {
                let path = words.next_if(|word| word.starts_with('/')).unwrap_or("/");
                check.kind = CheckKind::Http { path: plain("the path", path)?, host: None };
            }
            _ => return Err(BadCheck(format!("`{text}`: write `tcp` or `http /path` first"))),
        }
        let mut seen = Vec::new();
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| unknown(word))?;
            if seen.contains(&key) {
                return Err(BadCheck(format!("`{key}` is there twice")));
            }
            seen.push(key);
            check.set(key, value)?;
        }
        check.settle()
    }
}

impl BackendCheck {
    fn set(&mut self, key: &str, value: &str) -> Result<(), BadCheck> {
        match key {
            "port" => {
                let port = value.parse().ok().filter(|port| *port > 0);
                let bad = || BadCheck(format!("`port={value}` is no port number (1 to 65535)"));
                self.port = Some(port.ok_or_else(bad)?);
            }
            "host" => match &mut self.kind {
                CheckKind::Http { host, .. } if !value.is_empty() => *host = Some(plain("host", value)?),
                CheckKind::Http { .. } => return Err(BadCheck("`host=` is empty".into())),
                CheckKind::Tcp => return Err(BadCheck("`host=` is for http".into())),
            },
            "interval" => self.interval = span(key, value)?,
            "timeout" => self.timeout = span(key, value)?,
            "healthy" => self.healthy = in_a_row(key, value)?,
            "unhealthy" => self.unhealthy = in_a_row(key, value)?,
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    /// Checks the times against each other.
    fn settle(mut self) -> Result<Self, BadCheck> {
        let (shortest, longest) = (Self::SHORTEST_INTERVAL, Self::LONGEST_INTERVAL);
        if !(shortest..=longest).contains(&self.interval) {
            return Err(BadCheck(format!(
                "`interval={}` is not within {} to {}",
                Span(self.interval),
                Span(shortest),
                Span(longest)
            )));
        }
        if self.timeout.is_zero() {
            self.timeout = Self::TIMEOUT.min(self.interval);
        }
        if !(Self::SHORTEST_TIMEOUT..=self.interval).contains(&self.timeout) {
            return Err(BadCheck(format!(
                "`timeout={}` is not within {} and the interval, {}",
                Span(self.timeout),
                Span(Self::SHORTEST_TIMEOUT),
                Span(self.interval)
            )));
        }
        Ok(self)
    }
}

fn unknown(word: &str) -> BadCheck {
    BadCheck(format!(
        "`{word}` is not known here; there are port=, host=, interval=, timeout=, healthy=, unhealthy="
    ))
}

/// What goes into a request as it is: nothing that could end a line or a word.
fn plain(what: &str, text: &str) -> Result<String, BadCheck> {
    if text.len() > BackendCheck::LONGEST_TEXT || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(BadCheck(format!(
            "{what} has to be of at most {} printable ASCII characters; write others as %XX",
            BackendCheck::LONGEST_TEXT
        )));
    }
    Ok(text.to_owned())
}

fn span(key: &str, value: &str) -> Result<Duration, BadCheck> {
    let of = |unit: &str, milliseconds: u64| -> Option<u64> {
        let number = value.strip_suffix(unit)?;
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        number.parse::<u64>().ok().filter(|_| is_number)?.checked_mul(milliseconds)
    };
    let milliseconds = of("ms", 1).or_else(|| of("s", 1_000)).or_else(|| of("m", 60_000));
    milliseconds
        .filter(|milliseconds| *milliseconds > 0)
        .map(Duration::from_millis)
        .ok_or_else(|| BadCheck(format!("`{key}={value}` is no time (500ms, 5s, 1m)")))
}

fn in_a_row(key: &str, value: &str) -> Result<u8, BadCheck> {
    let maximum = BackendCheck::MAXIMUM_IN_A_ROW;
    let number = value.parse().ok().filter(|number| (1..=maximum).contains(number));
    number.ok_or_else(|| BadCheck(format!("`{key}={value}` is no number from 1 to {maximum}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_read_with_what_they_leave_out() {
        for (text, full) in [
            ("tcp", "tcp interval=5s timeout=2s healthy=2 unhealthy=3"),
            (" tcp  port=81 ", "tcp port=81 interval=5s timeout=2s healthy=2 unhealthy=3"),
            ("http", "http / interval=5s timeout=2s healthy=2 unhealthy=3"),
            ("http host=a.example", "http / host=a.example interval=5s timeout=2s healthy=2 unhealthy=3"),
            (
                "http /healthz?deep=1 unhealthy=1 interval=1s",
                "http /healthz?deep=1 interval=1s timeout=1s healthy=2 unhealthy=1",
            ),
            ("tcp interval=1m timeout=500ms", "tcp interval=60s timeout=500ms healthy=2 unhealthy=3"),
            ("tcp healthy=100 timeout=5s", "tcp interval=5s timeout=5s healthy=100 unhealthy=3"),
        ] {
            let check: BackendCheck = text.parse().unwrap();
            assert_eq!(check.to_string(), full);
            assert_eq!(full.parse(), Ok(check), "what is shown can be written");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, why) in [
            ("", "write `tcp`"),
            ("udp", "write `tcp`"),
            ("http:/healthz", "write `tcp`"),
            ("http healthz", "`healthz` is not known"),
            ("http /a /b", "`/b` is not known"),
            ("tcp /healthz", "`/healthz` is not known"),
            ("tcp host=a", "is for http"),
            ("http host=", "is empty"),
            ("http /ä", "printable ASCII"),
            ("tcp port=0", "no port number"),
            ("tcp port=65536", "no port number"),
            ("tcp interval=999ms", "not within 1s to 300s"),
            ("tcp interval=301s", "not within 1s to 300s"),
            ("tcp interval=5", "no time"),
            ("tcp interval=+5s", "no time"),
            ("tcp timeout=0s", "no time"),
            ("tcp timeout=99999999999999999999s", "no time"),
            ("tcp timeout=6s", "the interval, 5s"),
            ("tcp timeout=9ms", "not within 10ms"),
            ("tcp healthy=0", "from 1 to 100"),
            ("tcp unhealthy=101", "from 1 to 100"),
            ("tcp port=1 port=2", "twice"),
            ("tcp retries=3", "`retries` is not known"),
        ] {
            let error = text.parse::<BackendCheck>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(format!("http /{}", "a".repeat(1_024)).parse::<BackendCheck>().is_err());
    }

    #[test]
    fn datagrams_need_a_port_of_their_own() {
        let backend: SocketAddr = "10.0.0.1:53".parse().unwrap();
        let target = |text: &str, protocol| {
            let check = Arc::new(text.parse::<BackendCheck>().unwrap());
            let target = check.target(backend, protocol, ClientAddress::Path);
            target.map(|target| target.address.to_string())
        };
        assert_eq!(target("tcp", Protocol::Tcp).as_deref(), Some("10.0.0.1:53"));
        assert_eq!(target("tcp", Protocol::Udp), None);
        assert_eq!(target("tcp port=80", Protocol::Udp).as_deref(), Some("10.0.0.1:80"));
        assert_eq!(target("tcp port=80", Protocol::Tcp).as_deref(), Some("10.0.0.1:80"));
    }

    #[test]
    fn headers_go_where_clients_go() {
        let backend: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let header = |text: &str, clients| {
            let check = Arc::new(text.parse::<BackendCheck>().unwrap());
            check.target(backend, Protocol::Tcp, clients).unwrap().header
        };
        let (path, v2) = (ClientAddress::Path, ClientAddress::ProxyV2);
        assert_eq!(header("http", ClientAddress::ProxyV1), ClientAddress::ProxyV1);
        assert_eq!((header("http", v2), header("tcp port=80", v2)), (v2, v2));
        assert_eq!(header("http port=81", v2), path, "somebody else listens there");
        assert_eq!((header("http", path), header("http", ClientAddress::Transparent)), (path, path));
    }
}
