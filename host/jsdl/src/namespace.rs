//! The namespaces a job description is written in.

/// JSDL 1.0 (GFD.56).
pub const JSDL: &str = "http://schemas.ggf.org/jsdl/2005/11/jsdl";
/// JSDL-POSIX, the POSIXApplication (GFD.56, section 8).
pub const POSIX: &str = "http://schemas.ggf.org/jsdl/2005/11/jsdl-posix";
/// HPC Profile Application (GFD.111).
pub const HPCP: &str = "http://schemas.ggf.org/jsdl/2006/07/jsdl-hpcpa";
/// SPMD Application (GFD.115). Recognised, not supported.
pub const SPMD: &str = "http://schemas.ogf.org/jsdl/2007/02/jsdl-spmd";
/// Parameter sweep (GFD.149).
pub const SWEEP: &str = "http://schemas.ogf.org/jsdl/2009/03/sweep";
/// The functions that give a parameter sweep its values (GFD.149).
pub const SWEEP_FUNCTIONS: &str = "http://schemas.ogf.org/jsdl/2009/03/sweep/functions";
/// XSDL, XenBEE's description of the instance to start.
pub const XSDL: &str = "http://www.example.com/schemas/xbe/2007/01/xsdl";
/// XBE, XenBEE's own kinds of application.
pub const XBE: &str = "http://www.example.com/schemas/xbe/2007/01/xbe";

/// XML Schema instance: `xsi:type` and its like.
pub(crate) const XSI: &str = "http://www.w3.org/2001/XMLSchema-instance";
/// XML Schema.
pub(crate) const XSD: &str = "http://www.w3.org/2001/XMLSchema";
/// Bound to the prefix `xml`.
pub(crate) const XML: &str = "http://www.w3.org/XML/1998/namespace";
/// Bound to the prefix `xmlns`.
pub(crate) const XMLNS: &str = "http://www.w3.org/2000/xmlns/";

/// The customary prefix of each namespace, used in messages, in written documents and where a
/// lenient reading meets a prefix that was not declared.
pub(crate) const PREFIXES: &[(&str, &str)] = &[
    ("jsdl", JSDL),
    ("jsdl-posix", POSIX),
    ("jsdl-hpcpa", HPCP),
    ("jsdl-spmd", SPMD),
    ("jsdl-sweep", SWEEP),
    ("jsdl-sweepfunc", SWEEP_FUNCTIONS),
    ("xsdl", XSDL),
    ("xbe", XBE),
    ("xsi", XSI),
    ("xsd", XSD),
    ("xml", XML),
];

/// Other names under which the same namespace is found in documents.
const ALIASES: &[(&str, &str)] = &[
    ("http://xenbee.berlios.de/schemas/xsdl/2007/01/xsdl", XSDL),
    ("http://xenbee.berlios.de/schemas/xbe/2007/01/xbe", XBE),
    ("http://schemas.ggf.org/jsdl/2006/07/jsdl-hpcp", HPCP),
];

/// The one name this crate uses for the namespace `uri`.
pub(crate) fn canonical(uri: &str) -> &str {
    ALIASES
        .iter()
        .find(|(alias, _)| *alias == uri)
        .map_or(uri, |&(_, canonical)| canonical)
}

/// The namespace customarily bound to `prefix`.
pub(crate) fn by_prefix(prefix: &str) -> Option<&'static str> {
    PREFIXES
        .iter()
        .find(|(candidate, _)| *candidate == prefix)
        .map(|&(_, uri)| uri)
}

/// A qualified name as a reader expects it: customary prefix or the namespace in braces.
pub(crate) fn display(namespace: &str, local: &str) -> String {
    if namespace.is_empty() {
        return local.to_owned();
    }
    match PREFIXES.iter().find(|(_, uri)| *uri == namespace) {
        Some((prefix, _)) => format!("{prefix}:{local}"),
        None => format!("{{{namespace}}}{local}"),
    }
}
