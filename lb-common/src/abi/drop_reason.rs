//! Why a packet was not forwarded. Append-only: numbers are never reused.

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $number:literal, $name:literal, $expected:literal;)+) => {
        /// Why a packet was not forwarded. The number is the index in the array `drops`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant = $number,)+
        }

        impl DropReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name shown to people and used in metrics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+),)+ }
            }

            /// Whether it occurs in healthy operation; otherwise it deserves a look.
            #[must_use]
            pub const fn is_expected(self) -> bool {
                match self { $(Self::$variant => $expected,)+ }
            }
        }
    };
}

drop_reasons! {
    /// A connection to a Service without backends was refused (TCP RST, ICMP port unreachable).
    NoBackend = 0, "no-backend", true;
    /// A TCP packet that is no SYN belongs to no known connection, or to one that its client has replaced; answered with an RST, unless it comes from a backend on this node.
    NoFlow = 1, "no-flow", true;
    /// The backend of the connection is gone; answered with an RST.
    BackendGone = 2, "backend-gone", true;
    /// The packet's TTL or hop limit ran out here; answered with ICMP time exceeded.
    TtlExpired = 3, "ttl-expired", true;
    /// No source port towards the backend was free, or another CPU took it just then: if it goes on, add SNAT addresses.
    SnatPortsExhausted = 4, "snat-ports-exhausted", false;
    /// The node has no source address towards the backend.
    NoSnatAddress = 5, "no-snat-address", false;
    /// The backend's link-layer address is not known yet.
    NoNeighbour = 6, "no-neighbour", false;
    /// The flow tables took no further entry.
    TableFull = 7, "table-full", false;
    /// A later fragment came too long after its first one, or their connection is gone meanwhile.
    FragmentWithoutFirst = 8, "fragment-without-first", true;
    /// An RST would have been answered with an RST, which TCP forbids.
    ResetWithoutFlow = 9, "reset-without-flow", true;
    /// The packet could not be resized or edited in place.
    EditFailed = 10, "edit-failed", false;
    /// A Service's slot names a backend that does not exist.
    BadSlot = 11, "bad-slot", false;
    /// An ICMP error about a flow could not be translated because its quote is cut short.
    BadIcmpQuote = 12, "bad-icmp-quote", true;
    /// The program that handles new and unusual packets is not in place.
    NoSlowPath = 13, "no-slow-path", false;
    /// The device towards the next hop is not in the map `devices`, or needs TC, which is not attached: the agent has not set it up.
    NoDevice = 14, "no-device", false;
    /// The client is in none of the Service's source ranges (loadBalancerSourceRanges).
    SourceNotAllowed = 15, "source-not-allowed", true;
    /// The packet is larger than its way on takes; answered with ICMP fragmentation needed, or packet too big.
    TooBig = 16, "too-big", true;
    /// The client opens more connections to the Service than its connection rate limit allows; not answered.
    ConnectionRate = 17, "connection-rate", true;
    /// A SYN was answered with a SYN cookie; its connection begins when the cookie comes back.
    SynCookieSent = 18, "syn-cookie-sent", true;
    /// A TCP packet of no known connection brings back no valid SYN cookie; answered with an RST.
    SynCookieInvalid = 19, "syn-cookie-invalid", true;
}

impl DropReason {
    /// Number of reasons.
    pub const COUNT: usize = Self::ALL.len();

    /// The reason with a number.
    #[must_use]
    pub fn from_index(index: u32) -> Option<Self> {
        Self::ALL.get(index as usize).copied()
    }
}
