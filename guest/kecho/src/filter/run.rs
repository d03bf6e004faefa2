//! Runs a filter's instructions for one event.

use std::cmp::Ordering;

use super::code::{Code, Instruction};
use super::state::State;
use super::tree::{Arithmetic, Compare, Function, Property};
use super::{MAX_TEXT_VARIABLE_BYTES, WORK};
use crate::event::EventRef;
use crate::types::FieldKind;
use crate::value::{MAX_TEXT_BYTES, Value, ValueRef};

/// Why a filter could not decide on an event, which then does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// What is not there.
    #[error("a field, attribute or state is not there or no UTF-8; ask with has() first")]
    Missing,
    /// A value of the wrong kind.
    #[error("a value is of the wrong kind: a text where a number has to be, say")]
    Kind,
    /// A division of whole numbers by zero.
    #[error("a whole number is divided by 0; look at the divisor first")]
    Zero,
    /// A text that is too long.
    #[error(
        "a text is too long: at most {MAX_TEXT_BYTES} bytes, in a variable {MAX_TEXT_VARIABLE_BYTES}"
    )]
    Long,
    /// Too much work.
    #[error("more work than {WORK} steps for one event; compare shorter or fewer texts")]
    Work,
}

impl Failure {
    /// A stable name for programs.
    pub fn code(self) -> &'static str {
        match self {
            Failure::Missing => "filter-missing",
            Failure::Kind => "filter-kind",
            Failure::Zero => "filter-division",
            Failure::Long => "filter-text-length",
            Failure::Work => "filter-work",
        }
    }
}

/// Where a field is in a payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub kind: FieldKind,
    pub offset: usize,
}

/// What a filter looks at.
pub(super) struct Context<'a> {
    pub event: &'a EventRef<'a>,
    /// Where the fields of [`Code::fields`] are, if the event's type has them.
    pub places: &'a [Option<Place>],
    pub state: &'a State,
}

/// A value on the stack.
#[derive(Debug, Clone, Copy)]
enum Slot<'a> {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    /// A variable's text. It is read when it is used: no operator on texts can have a `set` between.
    Variable(u8),
}

impl<'a> From<ValueRef<'a>> for Slot<'a> {
    #[inline]
    fn from(value: ValueRef<'a>) -> Slot<'a> {
        match value {
            ValueRef::Bool(v) => Slot::Bool(v),
            ValueRef::Int(v) => Slot::Int(v),
            ValueRef::Float(v) => Slot::Float(v),
            ValueRef::Text(v) => Slot::Text(v),
            ValueRef::Bytes(v) => Slot::Bytes(v),
        }
    }
}

/// Runs it; short stacks are quicker to make.
pub(super) fn run<'a>(
    code: &'a Code,
    context: &Context<'a>,
    variables: &mut [Value],
) -> Result<bool, Failure> {
    match code.depth {
        0..=4 => run_with::<4>(code, context, variables),
        _ => run_with::<{ super::MAX_STACK }>(code, context, variables),
    }
}

fn run_with<'a, const DEPTH: usize>(
    code: &'a Code,
    context: &Context<'a>,
    variables: &mut [Value],
) -> Result<bool, Failure> {
    let mut stack = [Slot::Bool(false); DEPTH];
    // How many values there are.
    let mut top = 0;
    let mut work = WORK;
    let mut next = 0;
    // The generator has counted the stack; what is out of its bounds would be its fault.
    macro_rules! push {
        ($slot:expr) => {{
            let slot = $slot;
            *stack.get_mut(top).ok_or(Failure::Work)? = slot;
            top += 1;
        }};
    }
    macro_rules! pop {
        () => {{
            top = usize::checked_sub(top, 1).ok_or(Failure::Work)?;
            *stack.get(top).ok_or(Failure::Work)?
        }};
    }
    while let Some(&instruction) = code.instructions.get(next) {
        next += 1;
        match instruction {
            Instruction::Bool(v) => push!(Slot::Bool(v)),
            Instruction::Int(v) => push!(Slot::Int(v)),
            Instruction::Float(v) => push!(Slot::Float(v)),
            Instruction::Text(index) => {
                let text = code.texts.get(usize::from(index)).ok_or(Failure::Missing)?;
                push!(Slot::Text(text));
            }
            Instruction::Field(index) => {
                let value = field(context, index, &mut work)?;
                push!(value.ok_or(Failure::Missing)?);
            }
            Instruction::Attribute(index) => {
                let value = attribute(code, context, index, &mut work)?;
                push!(value.ok_or(Failure::Missing)?);
            }
            Instruction::State(index) => {
                let value = state(code, context, index, &mut work)?;
                push!(value.ok_or(Failure::Missing)?);
            }
            Instruction::HasField(index) => {
                push!(Slot::Bool(field(context, index, &mut work)?.is_some()));
            }
            Instruction::HasAttribute(index) => {
                let value = attribute(code, context, index, &mut work)?;
                push!(Slot::Bool(value.is_some()));
            }
            Instruction::HasState(index) => {
                let value = state(code, context, index, &mut work)?;
                push!(Slot::Bool(value.is_some()));
            }
            Instruction::Property(property) => push!(match property {
                Property::Type => Slot::Text(context.event.kind().name()),
                Property::Version => Slot::Int(context.event.kind().version().into()),
                Property::Size => Slot::Int(saturate(context.event.payload().len() as u64)),
                Property::Sequence => Slot::Int(saturate(context.event.sequence())),
            }),
            Instruction::Variable(index) => {
                push!(match variables.get(usize::from(index)) {
                    Some(Value::Bool(v)) => Slot::Bool(*v),
                    Some(Value::Int(v)) => Slot::Int(*v),
                    Some(Value::Float(v)) => Slot::Float(*v),
                    Some(Value::Text(_)) => Slot::Variable(index),
                    _ => return Err(Failure::Missing),
                });
            }
            Instruction::Set(index) => {
                set(variables, index, pop!())?;
                push!(Slot::Bool(true));
            }
            Instruction::Not => match pop!() {
                Slot::Bool(v) => push!(Slot::Bool(!v)),
                _ => return Err(Failure::Kind),
            },
            Instruction::Minus => match pop!() {
                Slot::Int(v) => push!(Slot::Int(v.saturating_neg())),
                Slot::Float(v) => push!(Slot::Float(-v)),
                _ => return Err(Failure::Kind),
            },
            Instruction::Compare(how) => {
                let (right, left) = (pop!(), pop!());
                push!(Slot::Bool(compare(how, left, right, variables, &mut work)?));
            }
            Instruction::Arithmetic(how) => {
                let (right, left) = (pop!(), pop!());
                push!(arithmetic(how, left, right, &mut work)?);
            }
            Instruction::Call(function) => match function {
                Function::Abs => match pop!() {
                    Slot::Int(v) => push!(Slot::Int(v.saturating_abs())),
                    Slot::Float(v) => push!(Slot::Float(v.abs())),
                    _ => return Err(Failure::Kind),
                },
                Function::Min | Function::Max => {
                    let (right, left) = (pop!(), pop!());
                    let min = function == Function::Min;
                    push!(match numbers(left, right)? {
                        Numbers::Int(a, b) => Slot::Int(if min { a.min(b) } else { a.max(b) }),
                        Numbers::Float(a, b) => Slot::Float(if min { a.min(b) } else { a.max(b) }),
                    });
                }
                Function::Len => {
                    let len = match pop!() {
                        Slot::Bytes(v) => v.len(),
                        other => text(other, variables)?.len(),
                    };
                    push!(Slot::Int(saturate(len as u64)));
                }
                Function::StartsWith | Function::EndsWith | Function::Contains => {
                    let (right, left) = (pop!(), pop!());
                    let (whole, part) = (text(left, variables)?, text(right, variables)?);
                    push!(Slot::Bool(match function {
                        Function::Contains => {
                            charge(&mut work, 2 * (whole.len() + part.len()))?;
                            whole.contains(part)
                        }
                        Function::StartsWith => {
                            charge(&mut work, part.len())?;
                            whole.starts_with(part)
                        }
                        _ => {
                            charge(&mut work, part.len())?;
                            whole.ends_with(part)
                        }
                    }));
                }
            },
            Instruction::And(there) => match pop!() {
                Slot::Bool(true) => {}
                Slot::Bool(false) => {
                    push!(Slot::Bool(false));
                    next = usize::from(there);
                }
                _ => return Err(Failure::Kind),
            },
            Instruction::Or(there) => match pop!() {
                Slot::Bool(false) => {}
                Slot::Bool(true) => {
                    push!(Slot::Bool(true));
                    next = usize::from(there);
                }
                _ => return Err(Failure::Kind),
            },
            Instruction::ExpectBool => match pop!() {
                Slot::Bool(v) => push!(Slot::Bool(v)),
                _ => return Err(Failure::Kind),
            },
        }
    }
    match pop!() {
        Slot::Bool(passes) => Ok(passes),
        _ => Err(Failure::Kind),
    }
}

/// Takes so many steps off what may still be done.
#[inline]
fn charge(work: &mut usize, steps: usize) -> Result<(), Failure> {
    *work = work.checked_sub(steps).ok_or(Failure::Work)?;
    Ok(())
}

fn saturate(v: u64) -> i64 {
    i64::try_from(v).unwrap_or(i64::MAX)
}

#[inline]
fn field<'a>(
    context: &Context<'a>,
    index: u8,
    work: &mut usize,
) -> Result<Option<Slot<'a>>, Failure> {
    let Some(Some(place)) = context.places.get(usize::from(index)) else {
        return Ok(None);
    };
    let payload = context.event.payload();
    let end = place.offset + place.kind.size();
    let Some(bytes) = payload.get(place.offset..end) else {
        return Ok(None);
    };
    if let FieldKind::Text(_) = place.kind {
        // Not further than what a text may have: a field may be long and full.
        let looked = &bytes[..bytes.len().min(MAX_TEXT_BYTES + 1)];
        let end = looked.iter().position(|&b| b == 0).unwrap_or(looked.len());
        charge(work, end)?;
        return match end > MAX_TEXT_BYTES {
            true => Err(Failure::Long),
            false => Ok(std::str::from_utf8(&bytes[..end]).ok().map(Slot::Text)),
        };
    }
    Ok(place.kind.read(bytes).map(Slot::from))
}

/// Steps of looking at one attribute or state of another name.
const LOOK: usize = 8;

#[inline]
fn attribute<'a>(
    code: &'a Code,
    context: &Context<'a>,
    index: u8,
    work: &mut usize,
) -> Result<Option<Slot<'a>>, Failure> {
    let name = code.names.get(usize::from(index)).ok_or(Failure::Missing)?;
    let (looked, value) = context.event.find_attribute(name);
    charge(work, looked * LOOK)?;
    if let Some(ValueRef::Text(text)) = value {
        charge(work, text.len())?;
    }
    Ok(value.map(Slot::from))
}

#[inline]
fn state<'a>(
    code: &'a Code,
    context: &Context<'a>,
    index: u8,
    work: &mut usize,
) -> Result<Option<Slot<'a>>, Failure> {
    let name = code.names.get(usize::from(index)).ok_or(Failure::Missing)?;
    charge(work, context.state.len() * LOOK)?;
    Ok(context.state.get(name).map(|v| Slot::from(v.borrow())))
}

fn text<'t>(slot: Slot<'t>, variables: &'t [Value]) -> Result<&'t str, Failure> {
    match slot {
        Slot::Text(text) => Ok(text),
        Slot::Variable(index) => match variables.get(usize::from(index)) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(Failure::Kind),
        },
        _ => Err(Failure::Kind),
    }
}

/// Stores a value, if the variable is of its kind.
fn set(variables: &mut [Value], index: u8, slot: Slot<'_>) -> Result<(), Failure> {
    if let Slot::Variable(from) = slot {
        let Some(Value::Text(text)) = variables.get(usize::from(from)) else {
            return Err(Failure::Kind);
        };
        let text = text.clone();
        return set(variables, index, Slot::Text(&text));
    }
    match (variables.get_mut(usize::from(index)), slot) {
        (Some(Value::Bool(v)), Slot::Bool(new)) => *v = new,
        (Some(Value::Int(v)), Slot::Int(new)) => *v = new,
        (Some(Value::Float(v)), Slot::Float(new)) => *v = new,
        (Some(Value::Float(v)), Slot::Int(new)) => *v = new as f64,
        (Some(Value::Text(v)), Slot::Text(new)) => {
            if new.len() > MAX_TEXT_VARIABLE_BYTES {
                return Err(Failure::Long);
            }
            v.clear();
            v.push_str(new);
        }
        _ => return Err(Failure::Kind),
    }
    Ok(())
}

enum Numbers {
    Int(i64, i64),
    Float(f64, f64),
}

/// Both as whole numbers if they are, else both as floats.
#[inline]
fn numbers(left: Slot<'_>, right: Slot<'_>) -> Result<Numbers, Failure> {
    Ok(match (left, right) {
        (Slot::Int(a), Slot::Int(b)) => Numbers::Int(a, b),
        (Slot::Float(a), Slot::Float(b)) => Numbers::Float(a, b),
        (Slot::Int(a), Slot::Float(b)) => Numbers::Float(a as f64, b),
        (Slot::Float(a), Slot::Int(b)) => Numbers::Float(a, b as f64),
        _ => return Err(Failure::Kind),
    })
}

#[inline]
fn compare(
    how: Compare,
    left: Slot<'_>,
    right: Slot<'_>,
    variables: &[Value],
    work: &mut usize,
) -> Result<bool, Failure> {
    let order = match (left, right) {
        (Slot::Int(_) | Slot::Float(_), _) => match numbers(left, right)? {
            Numbers::Int(a, b) => Some(a.cmp(&b)),
            Numbers::Float(a, b) => a.partial_cmp(&b),
        },
        (Slot::Bool(a), Slot::Bool(b)) => equality(how, a == b)?,
        (Slot::Bytes(a), Slot::Bytes(b)) => {
            charge(work, a.len().min(b.len()))?;
            equality(how, a == b)?
        }
        _ => {
            let (left, right) = (text(left, variables)?, text(right, variables)?);
            charge(work, left.len().min(right.len()))?;
            Some(left.cmp(right))
        }
    };
    // No order is that of a number and NaN.
    Ok(match how {
        Compare::Equal => order == Some(Ordering::Equal),
        Compare::NotEqual => order != Some(Ordering::Equal),
        Compare::Less => order == Some(Ordering::Less),
        Compare::LessEqual => matches!(order, Some(Ordering::Less | Ordering::Equal)),
        Compare::Greater => order == Some(Ordering::Greater),
        Compare::GreaterEqual => matches!(order, Some(Ordering::Greater | Ordering::Equal)),
    })
}

/// Equal or not, of what has no order.
fn equality(how: Compare, equal: bool) -> Result<Option<Ordering>, Failure> {
    match how {
        Compare::Equal | Compare::NotEqual => Ok(equal.then_some(Ordering::Equal)),
        _ => Err(Failure::Kind),
    }
}

#[inline]
fn arithmetic<'a>(
    how: Arithmetic,
    left: Slot<'_>,
    right: Slot<'_>,
    work: &mut usize,
) -> Result<Slot<'a>, Failure> {
    Ok(match numbers(left, right)? {
        Numbers::Int(a, b) => Slot::Int(match how {
            Arithmetic::Add => a.saturating_add(b),
            Arithmetic::Subtract => a.saturating_sub(b),
            Arithmetic::Multiply => a.saturating_mul(b),
            Arithmetic::Divide | Arithmetic::Remainder if b == 0 => return Err(Failure::Zero),
            Arithmetic::Divide => a.saturating_div(b),
            Arithmetic::Remainder => a.wrapping_rem(b),
        }),
        Numbers::Float(a, b) => Slot::Float(match how {
            Arithmetic::Add => a + b,
            Arithmetic::Subtract => a - b,
            Arithmetic::Multiply => a * b,
            Arithmetic::Divide => a / b,
            Arithmetic::Remainder => {
                // It is computed bit by bit where the one is much larger than the other.
                let exponent = |v: f64| (v.to_bits() >> 52 & 0x7ff) as usize;
                charge(work, exponent(a).saturating_sub(exponent(b)))?;
                a % b
            }
        }),
    })
}
