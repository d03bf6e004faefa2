//! XenBEE's XML messages. The only crate that knows their XML.
//!
//! [`activity_status`] is a task in the words of OGSA-BES 1.0 (GFD.108).
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod status;

pub use status::activity_status;

/// Namespace of OGSA-BES 1.0 (GFD.108).
pub const BES: &str = "http://schemas.ggf.org/bes/2006/08/bes-factory";
/// Namespace of what XenBEE adds.
pub const XBE: &str = "http://www.xenbee.net/schema/2008/02/xbe";
