//! The switch as a process: its control socket, hostile drivers on its rings, and real guests.
#![allow(clippy::unwrap_used)]

mod control;
mod driver;
mod ether;
mod figures;
mod guests;
mod programs;
mod rings;
mod vm;
