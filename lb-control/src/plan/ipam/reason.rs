//! Why a Service does not have what it wishes, in the form that Events and conditions want.

/// Somebody else holds the address.
pub const ADDRESS_IN_USE: &str = "AddressInUse";
/// Somebody else holds the address, and does not share it with this Service.
pub const SHARING_REFUSED: &str = "SharingRefused";
/// No pool that serves the Service has an address left.
pub const NO_FREE_ADDRESS: &str = "NoFreeAddress";
/// The pool does not serve the Service, or gives out nothing.
pub const POOL_NOT_ALLOWED: &str = "PoolNotAllowed";
/// There is no pool of that name, or it is set aside.
pub const NO_SUCH_POOL: &str = "NoSuchPool";
/// The address is in no pool, or not in the one that the Service names.
pub const NOT_IN_POOL: &str = "NotInPool";
/// No pool that serves the Service has addresses of the family, or the wish contradicts its own
/// families.
pub const FAMILY_UNAVAILABLE: &str = "FamilyUnavailable";
/// The Service has an address, for as long as it wants it, that it would not get today.
pub const DRAINING: &str = "Draining";
