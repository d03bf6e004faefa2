//! Parameter sweeps (GFD.149): one document, many jobs.
//!
//! A `Sweep` behind the `JobDescription` says which places of the document get which values.
//! Assignments in one `Sweep` go in lock step; a `Sweep` in another runs through for each round of the
//! outer one; several beside each other follow one another. One without assignments only holds others.
//!
//! Where the standard leaves a choice: a match finds exactly one place (see [`expand`] for what it may
//! be); the characters of `substring` are counted in the text as it stands in the document, so that
//! values put into one text do not move each other; no two values of a job go to the same place.

use std::collections::HashSet;
use std::ops::Range;
use std::rc::Rc;

use crate::diagnostic::{Diagnostic, Position, quoted, shown};
use crate::document::{Element, Node};
use crate::function::Function;
use crate::limits::{
    MAX_DIAGNOSTICS, MAX_DOCUMENT_BYTES, MAX_SWEEP_BYTES, MAX_SWEEP_DEPTH, MAX_SWEEP_MATCHES,
};
use crate::namespace::{self, JSDL, SWEEP};
use crate::tree::Tree;
use crate::xpath::{Index, Match, Part, Place};
use crate::{Options, Parsed, load, read, schema, serialize, validate};

/// Most characters of a job's assignments in a message.
const MAX_SHOWN_CHARS: usize = 120;

/// A document with a parameter sweep. The jobs are made when they are asked for.
///
/// It cannot be sent to another thread; its [`Member`]s can.
#[derive(Debug)]
pub struct Sweep {
    /// The document without sweeps.
    template: Element,
    /// The values of `xml:id` in it.
    ids: HashSet<String>,
    /// Each once.
    places: Vec<TextPlace>,
    levels: Vec<Level>,
    count: u64,
    position: Position,
    forgiven: Vec<Diagnostic>,
}

/// One job of a sweep.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its place in the sweep, counted from 1.
    pub number: u64,
    /// What makes it differ from the others, in document order.
    pub assignments: Vec<Assigned>,
    /// The job, and what of it is ignored.
    pub parsed: Parsed,
    /// Its own document, which [`crate::parse`] reads as the same job. It has no sweep and no comments.
    pub document: String,
}

/// A value and where it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    /// The place for people, such as `Application/POSIXApplication/Argument[2]`.
    pub place: String,
    /// The value, which may be only a part of the text there.
    pub value: String,
}

#[derive(Debug)]
struct TextPlace {
    place: Place,
    name: String,
    /// What stands there in the document.
    text: String,
}

/// One `Sweep` element.
#[derive(Debug)]
struct Level {
    assignments: Vec<Assignment>,
    /// How many values each assignment has; 1 without any.
    rounds: u64,
    inner: Vec<Level>,
    /// Jobs in one round.
    jobs_a_round: u64,
}

impl Level {
    fn count(&self) -> Option<u64> {
        self.rounds.checked_mul(self.jobs_a_round)
    }
}

#[derive(Debug)]
struct Assignment {
    targets: Vec<Target>,
    function: Function,
}

#[derive(Debug, Clone)]
struct Target {
    /// Index into [`Sweep::places`].
    place: usize,
    /// The bytes of the text that are replaced.
    range: Range<usize>,
    /// Whether all of the text is, even if it is empty.
    is_whole: bool,
    position: Position,
}

impl Target {
    fn overlaps(&self, other: &Target) -> bool {
        let (a, b) = (&self.range, &other.range);
        self.place == other.place
            && (self.is_whole
                || other.is_whole
                || a.start == b.start
                || (a.start < b.end && b.start < a.end))
    }
}

/// Reads a document as a parameter sweep of at most `max_jobs` jobs; nothing if it has no sweep, and is
/// to be read with [`crate::parse`].
///
/// A match is a path of XPath 1.0 from `/` or `//` on, with names, `*`, `text()` at its end or an
/// attribute there, and the predicates `[2]`, `[last()]`, `[position()=2]` and `[@a='b']`; or `substring` of
/// such a path with one or two whole numbers. It finds one element with text only or one attribute.
///
/// The jobs themselves are not looked at: [`Sweep::jobs`] does so.
///
/// # Errors
/// Why it is no sweep: not well-formed, wrong in itself, too large (`sweep-too-large`), or not supported
/// (codes beginning with `unsupported-`).
pub fn expand(
    document: &[u8],
    options: &Options,
    max_jobs: u64,
) -> Result<Option<Sweep>, Vec<Diagnostic>> {
    let mut tree = load(document, options)?;
    let sweeps = match tree.root.is(JSDL, "JobDefinition") {
        true => take_sweeps(&mut tree.root),
        false => Vec::new(),
    };
    let Some(position) = sweeps.first().map(|sweep| sweep.position) else {
        return Ok(None);
    };
    let mut findings: Vec<Diagnostic> = sweeps
        .iter()
        .flat_map(|sweep| validate::validate_part(sweep, schema::SWEPT))
        .collect();
    if !findings.is_empty() {
        findings.truncate(MAX_DIAGNOSTICS);
        return Err(findings);
    }
    let mut reader = Reader {
        root: &tree.root,
        index: Index::new(&tree.root),
        places: Vec::new(),
        matches: 0,
        findings: Vec::new(),
    };
    let levels: Vec<Level> = sweeps.iter().map(|sweep| reader.level(sweep, 1)).collect();
    reader.overlaps(&levels, &mut Vec::new());
    let (places, mut findings) = (reader.places, reader.findings);
    if !findings.is_empty() {
        findings.truncate(MAX_DIAGNOSTICS);
        return Err(findings);
    }
    let too_large = |message: String| Err(vec![position.diagnostic("sweep-too-large", message)]);
    let count = match sum(&levels) {
        Some(count) if count <= max_jobs => count,
        Some(count) => {
            return too_large(format!(
                "the sweep has {count} jobs, expected at most {max_jobs}"
            ));
        }
        None => return too_large(format!("the sweep has more than {} jobs", u64::MAX)),
    };
    let bytes =
        (serialize::document(&tree.root).len() as u64).saturating_add(growth_bytes(&levels));
    if bytes > MAX_DOCUMENT_BYTES as u64 {
        return too_large(format!(
            "a job of the sweep may have a document of {bytes} bytes, expected at most \
             {MAX_DOCUMENT_BYTES}"
        ));
    }
    if bytes.saturating_mul(count) > MAX_SWEEP_BYTES {
        return too_large(format!(
            "the {count} jobs of the sweep may have documents of {} bytes together, expected at most \
             {MAX_SWEEP_BYTES}",
            bytes.saturating_mul(count)
        ));
    }
    Ok(Some(Sweep {
        template: tree.root,
        ids: tree.ids,
        places,
        levels,
        count,
        position,
        forgiven: tree.forgiven,
    }))
}

/// Takes the sweeps out of a definition. Text on both sides becomes one piece, as it will be read.
fn take_sweeps(root: &mut Element) -> Vec<Element> {
    let mut sweeps = Vec::new();
    let mut kept: Vec<Node> = Vec::new();
    for node in std::mem::take(&mut root.children) {
        match (node, kept.last_mut()) {
            (Node::Element(child), _) if child.is(SWEEP, "Sweep") => sweeps.push(child),
            (Node::Text(text, stray), Some(Node::Text(before, first))) => {
                before.push_str(&text);
                *first = first.or(stray);
            }
            (node, _) => kept.push(node),
        }
    }
    root.children = kept;
    sweeps
}

fn sum(levels: &[Level]) -> Option<u64> {
    levels
        .iter()
        .try_fold(0_u64, |sum, level| sum.checked_add(level.count()?))
}

/// By how many bytes a job's document is longer than the template, at most.
fn growth_bytes(levels: &[Level]) -> u64 {
    let growth = |level: &Level| {
        let own = level.assignments.iter().map(|assignment| {
            (assignment.function.longest_bytes() as u64)
                .saturating_mul(assignment.targets.len() as u64)
        });
        own.fold(growth_bytes(&level.inner), u64::saturating_add)
    };
    levels.iter().map(growth).max().unwrap_or(0)
}

struct Reader<'t> {
    root: &'t Element,
    index: Index<'t>,
    places: Vec<TextPlace>,
    matches: usize,
    findings: Vec<Diagnostic>,
}

impl Reader<'_> {
    /// Reads a `Sweep` and those inside it.
    fn level(&mut self, sweep: &Element, depth: usize) -> Level {
        let mut lengths: Vec<(u64, Position)> = Vec::new();
        let mut assignments = Vec::new();
        for element in sweep.all(SWEEP, "Assignment") {
            match self.assignment(element) {
                Ok(assignment) => {
                    lengths.push((assignment.function.count(), element.position));
                    assignments.push(assignment);
                }
                Err(finding) => self.findings.push(finding),
            }
        }
        let (rounds, first) = lengths.first().copied().unwrap_or((1, sweep.position));
        if let Some((other, position)) = lengths.iter().find(|(length, _)| *length != rounds) {
            self.findings.push(position.diagnostic(
                "unequal-assignments",
                format!(
                    "the assignment has {other} values and that of line {} has {rounds}, expected as \
                     many in all of one jsdl-sweep:Sweep",
                    first.line
                ),
            ));
        }
        let inner: Vec<Level> = if depth < MAX_SWEEP_DEPTH {
            let inner = sweep.all(SWEEP, "Sweep");
            inner.map(|inner| self.level(inner, depth + 1)).collect()
        } else {
            if let Some(inner) = sweep.child(SWEEP, "Sweep") {
                self.findings.push(inner.position.diagnostic(
                    "sweep-too-large",
                    format!("sweeps are nested deeper than {MAX_SWEEP_DEPTH}"),
                ));
            }
            Vec::new()
        };
        if sweep.elements().next().is_none() {
            self.findings.push(sweep.position.diagnostic(
                "missing-element",
                format!(
                    "element {} is empty, expected jsdl-sweep:Assignment in it",
                    sweep.display()
                ),
            ));
        }
        let jobs_a_round = match inner.is_empty() {
            true => 1,
            // What overflows here does so in the product too, which is what is reported.
            false => sum(&inner).unwrap_or(u64::MAX),
        };
        Level {
            assignments,
            rounds,
            inner,
            jobs_a_round,
        }
    }

    fn assignment(&mut self, element: &Element) -> Result<Assignment, Diagnostic> {
        let mut targets = Vec::new();
        let mut function = None;
        for child in element.elements() {
            if child.is(SWEEP, "DocumentNode") {
                targets.push(self.target(child)?);
            } else if &*child.namespace == SWEEP {
                return Err(child.position.diagnostic(
                    "unsupported-sweep",
                    format!(
                        "the parameter {} is not supported, expected jsdl-sweep:DocumentNode",
                        child.display()
                    ),
                ));
            } else {
                function = Some(Function::read(child)?);
            }
        }
        match function {
            Some(function) => Ok(Assignment { targets, function }),
            // Validation has let no such assignment pass.
            None => Err(element
                .position
                .diagnostic("missing-element", "an assignment without values")),
        }
    }

    fn target(&mut self, element: &Element) -> Result<Target, Diagnostic> {
        self.matches += 1;
        let at = element.position;
        if self.matches > MAX_SWEEP_MATCHES {
            return Err(at.diagnostic(
                "sweep-too-large",
                format!("the document has more than {MAX_SWEEP_MATCHES} matches"),
            ));
        }
        let bindings: Vec<(String, Rc<str>)> = element
            .all(SWEEP, "NamespaceBinding")
            .filter_map(|binding| {
                let prefix = crate::chars::trim(&binding.attribute("prefix")?.value).to_owned();
                let uri = crate::chars::trim(&binding.attribute("ns")?.value);
                Some((prefix, Rc::from(namespace::canonical(uri))))
            })
            .collect();
        let (text, at) = match element.child(SWEEP, "Match") {
            Some(expression) => (expression.text(), expression.position),
            None => (String::new(), at),
        };
        let found = Match::parse(&text, &bindings, at)?;
        let place = self.index.find(&found, &text, at)?;
        let number = self.place(place);
        let own = &self.places[number];
        let (range, is_whole) = match found.part {
            None => (0..own.text.len(), true),
            Some(part) => (bytes_of(&own.text, part, at)?, false),
        };
        Ok(Target {
            place: number,
            range,
            is_whole,
            position: at,
        })
    }

    /// The number of a place.
    fn place(&mut self, place: Place) -> usize {
        if let Some(known) = self.places.iter().position(|known| known.place == place) {
            return known;
        }
        let (mut at, mut name) = (self.root, String::new());
        for (depth, &child) in place.path.iter().enumerate() {
            let Some(Node::Element(element)) = at.children.get(child) else {
                break;
            };
            // All are in the description.
            if depth > 0 || !element.is(JSDL, "JobDescription") {
                name.push_str(if name.is_empty() { "" } else { "/" });
                name.push_str(&step(at, element));
            }
            at = element;
        }
        let text = match place.attribute.and_then(|index| at.attributes.get(index)) {
            Some(attribute) => {
                name.push_str(if name.is_empty() { "@" } else { "/@" });
                name.push_str(&attribute.local);
                attribute.value.clone()
            }
            None => at.text(),
        };
        self.places.push(TextPlace { place, name, text });
        self.places.len() - 1
    }

    /// Reports values that go to the same place in one job; `around` are the targets of the sweeps
    /// around these.
    fn overlaps<'l>(&mut self, levels: &'l [Level], around: &mut Vec<&'l Target>) {
        for level in levels {
            let outer = around.len();
            for target in level.assignments.iter().flat_map(|a| &a.targets) {
                if let Some(other) = around.iter().find(|other| target.overlaps(other)) {
                    self.findings.push(target.position.diagnostic(
                        "overlapping-matches",
                        format!(
                            "the match finds {}, as that of line {} does for the same job, expected \
                             another place",
                            self.places[target.place].name, other.position.line
                        ),
                    ));
                }
                around.push(target);
            }
            self.overlaps(&level.inner, around);
            around.truncate(outer);
        }
    }
}

/// The name of an element inside `parent`, with its number if there are several.
fn step(parent: &Element, element: &Element) -> String {
    let mut like = parent.all(&element.namespace, &element.local);
    let before = like
        .by_ref()
        .take_while(|other| !std::ptr::eq(*other, element))
        .count();
    if before == 0 && like.next().is_none() {
        element.local.clone()
    } else {
        format!("{}[{}]", element.local, before + 1)
    }
}

/// The bytes of a part of the text, in the way of XPath's `substring` (XPath 1.0, 4.2). A part of no
/// length lies before its start.
fn bytes_of(text: &str, part: Part, at: Position) -> Result<Range<usize>, Diagnostic> {
    let characters = text.chars().count() as u64;
    let behind = part
        .length
        .map_or(u64::MAX, |length| part.start.saturating_add(length));
    let from = part.start.max(1);
    let to = behind.clamp(from, (characters + 1).max(from));
    let is_insertion = part.length == Some(0) && part.start >= 1;
    if from > characters + 1 || (from >= to && !is_insertion) {
        return Err(at.diagnostic(
            "match-finds-nothing",
            format!(
                "the part of the text that the match finds is empty, expected one of {}, which has \
                 {characters} characters",
                quoted(text)
            ),
        ));
    }
    let byte = |character: u64| {
        usize::try_from(character - 1)
            .ok()
            .and_then(|character| text.char_indices().nth(character))
            .map_or(text.len(), |(byte, _)| byte)
    };
    Ok(byte(from)..byte(to))
}

impl Sweep {
    /// How many jobs there are, at least one.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The line of the first `Sweep` element, counted from 1.
    #[must_use]
    pub fn line(&self) -> u32 {
        self.position.line
    }

    /// The column of the first `Sweep` element in characters, counted from 1.
    #[must_use]
    pub fn column(&self) -> u32 {
        self.position.column
    }

    /// What a lenient reading let pass in the document. It is not in the [`Member`]s, too.
    #[must_use]
    pub fn forgiven(&self) -> &[Diagnostic] {
        &self.forgiven
    }

    /// The jobs, each read as if it had been submitted alone. The errors of one say which it is.
    ///
    /// The inner sweeps change first. To have all or the first that is wrong, `collect` them.
    pub fn jobs(&self) -> impl Iterator<Item = Result<Member, Vec<Diagnostic>>> {
        (0..self.count).map(|index| self.job(index))
    }

    fn job(&self, index: u64) -> Result<Member, Vec<Diagnostic>> {
        let mut values: Vec<(&Target, String)> = Vec::new();
        find(&self.levels, index, &mut values);
        let assignments: Vec<Assigned> = values
            .iter()
            .map(|(target, value)| Assigned {
                place: self.places[target.place].name.clone(),
                value: value.clone(),
            })
            .collect();
        let mut tree = Tree {
            root: self.template.clone(),
            ids: self.ids.clone(),
            forgiven: Vec::new(),
        };
        // A part behind another one of the same text stands behind it.
        values.sort_by_key(|(target, _)| (target.place, target.range.start));
        for group in values.chunk_by(|(a, _), (b, _)| a.place == b.place) {
            let Some(own) = group.first().map(|(target, _)| &self.places[target.place]) else {
                continue;
            };
            let (mut text, mut end) = (String::new(), 0);
            for (target, value) in group {
                text.push_str(&own.text[end..target.range.start]);
                text.push_str(value);
                end = target.range.end;
            }
            text.push_str(&own.text[end..]);
            put(&mut tree.root, &own.place, text);
        }
        let found = validate::validate(&tree, schema::UNDERSTOOD);
        let read = match found.is_empty() {
            true => {
                let (job, findings) = read::read(&tree.root);
                match findings.errors.is_empty() {
                    true => Ok((job, findings.warnings)),
                    false => Err(findings.errors),
                }
            }
            false => Err(found),
        };
        let number = index + 1;
        match read {
            Ok((job, warnings)) => Ok(Member {
                number,
                assignments,
                parsed: Parsed {
                    job,
                    warnings,
                    forgiven: Vec::new(),
                },
                document: serialize::document(&tree.root),
            }),
            Err(mut findings) => {
                let which = which(number, self.count, &assignments);
                for finding in &mut findings {
                    finding.message = format!("{which}: {}", finding.message);
                }
                Err(findings)
            }
        }
    }
}

/// The values of a job, by its index.
fn find<'l>(levels: &'l [Level], mut index: u64, values: &mut Vec<(&'l Target, String)>) {
    for level in levels {
        // The whole has been counted, so no part of it overflows.
        let count = level.count().unwrap_or(u64::MAX);
        if index >= count {
            index -= count;
            continue;
        }
        let round = index / level.jobs_a_round;
        for assignment in &level.assignments {
            let value = assignment.function.value(round);
            let targets = assignment.targets.iter();
            values.extend(targets.map(|target| (target, value.clone())));
        }
        return find(&level.inner, index % level.jobs_a_round, values);
    }
}

/// Puts a text into the tree.
fn put(root: &mut Element, place: &Place, text: String) {
    let mut at = root;
    for &child in &place.path {
        let Some(Node::Element(element)) = at.children.get_mut(child) else {
            return;
        };
        at = element;
    }
    if let Some(index) = place.attribute {
        if let Some(attribute) = at.attributes.get_mut(index) {
            attribute.value = text;
        }
        return;
    }
    let stray = text
        .contains(|c| !crate::chars::is_space(c))
        .then_some(at.position);
    at.children = match text.is_empty() {
        true => Vec::new(),
        false => vec![Node::Text(text, stray)],
    };
}

/// A job for messages: `job 3 of 10 (JobIdentification/JobName = c)`.
fn which(number: u64, count: u64, assignments: &[Assigned]) -> String {
    let list: Vec<String> = assignments
        .iter()
        .take(MAX_SHOWN_CHARS)
        .map(|assigned| format!("{} = {}", assigned.place, assigned.value))
        .collect();
    format!(
        "job {number} of {count} ({})",
        shown(&list.join(", "), MAX_SHOWN_CHARS)
    )
}
