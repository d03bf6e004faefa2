//! Reads, checks and writes job descriptions.
//!
//! This is the only crate that knows the XML of JSDL 1.0 (GFD.56), its POSIX part, the HPC Profile
//! Application (GFD.111) and XSDL, XenBEE's description of the instance a job runs in.
//!
//! - [`verdict`]: is the document valid JSDL, as any schema validator would have it?
//! - [`parse`]: the typed [`Job`], or all that keeps it from being one that XenBEE can run.
//! - [`sweep::expand`]: the jobs of a document with a parameter sweep (GFD.149).
//! - [`write()`]: a document for a job.
//!
//! Two conventions of ours: a package whose URI is `image:NAME` is the image `NAME` of the host
//! ([`InstanceSource::image_name`]); white space around texts is dropped unless the element has
//! `xml:space="preserve"`.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod chars;
mod datatypes;
mod datetime;
mod diagnostic;
mod document;
mod encoding;
mod extensions;
mod function;
mod job;
mod lenient;
pub mod limits;
mod namespace;
mod prolog;
mod range;
mod read;
mod schema;
mod serialize;
pub mod sweep;
mod tree;
mod uri;
mod validate;
mod write;
mod xpath;

pub use diagnostic::Diagnostic;
pub use job::{
    Application, ApplicationKind, Compression, ControlScript, CreationFlag, DataStaging,
    EnvironmentVariable, FileSystem, Hash, HashAlgorithm, IMAGE_SCHEME, Identification, Instance,
    InstanceDefinition, InstanceSource, Job, KernelArgument, Limits, Located, Location, Process,
    Resources, ScriptTarget, UnknownName, WELL_KNOWN_FILE_SYSTEMS,
};
pub use range::{Bound, Exact, Range, RangeValue};
pub use write::{WriteError, write};

/// How a document is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Accept common mistakes and say so in [`Parsed::forgiven`]: elements out of order, missing
    /// wrappers, a missing creation flag, customary prefixes without declaration.
    pub lenient: bool,
}

/// A document that was understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// What it says.
    pub job: Job,
    /// What it says besides, and is ignored.
    pub warnings: Vec<Diagnostic>,
    /// What a lenient reading let pass.
    pub forgiven: Vec<Diagnostic>,
}

/// Reads a job.
///
/// # Errors
/// Why the document is not a job that XenBEE can run: not well-formed, not valid, or valid but with
/// contents that are not supported (codes beginning with `unsupported-`) or make no sense.
pub fn parse(document: &[u8], options: &Options) -> Result<Parsed, Vec<Diagnostic>> {
    let tree = load(document, options)?;
    let findings = validate::validate(&tree, schema::UNDERSTOOD);
    if !findings.is_empty() {
        return Err(findings);
    }
    let (job, findings) = read::read(&tree.root);
    if findings.errors.is_empty() {
        Ok(Parsed {
            job,
            warnings: findings.warnings,
            forgiven: tree.forgiven,
        })
    } else {
        Err(findings.errors)
    }
}

/// Whether a document is valid JSDL: the verdict of an XML Schema validator that has the schemas of
/// JSDL 1.0 and JSDL-POSIX, and lets foreign elements through where they are allowed.
///
/// # Errors
/// All that is wrong, in document order; only the first finding if the document is not well-formed.
pub fn verdict(document: &[u8]) -> Result<(), Vec<Diagnostic>> {
    verdict_with(document, &Options::default()).map(|_| ())
}

/// The [`verdict`], with [`Options::lenient`] on the document as it was repaired; what was forgiven
/// for that.
///
/// # Errors
/// As of [`verdict`].
pub fn verdict_with(
    document: &[u8],
    options: &Options,
) -> Result<Vec<Diagnostic>, Vec<Diagnostic>> {
    let tree = load(document, options)?;
    let findings = validate::validate(&tree, schema::STANDARD);
    if findings.is_empty() {
        Ok(tree.forgiven)
    } else {
        Err(findings)
    }
}

fn load(document: &[u8], options: &Options) -> Result<tree::Tree, Vec<Diagnostic>> {
    let text = encoding::decode(document).map_err(|error| vec![error])?;
    let mut tree = tree::build(&text, options.lenient).map_err(|error| vec![error])?;
    if options.lenient {
        lenient::repair(&mut tree.root, &mut tree.forgiven);
        tree.forgiven.truncate(limits::MAX_DIAGNOSTICS);
    }
    Ok(tree)
}
