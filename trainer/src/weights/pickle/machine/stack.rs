//! Bytes of a pickle, and the machine's stack.

use std::io::{BufRead, Read};

use super::{Id, MAX_LINE, MAX_NODES, Machine, NONE, Node, Step};
use crate::weights::pickle::Value;

impl<R: BufRead> Machine<R> {
    pub(super) fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let mut out = [0; N];
        match self.reader.read_exact(&mut out) {
            Ok(()) => {
                self.at += N as u64;
                Ok(out)
            }
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => self.error("the file ends here"),
            Err(e) => self.error(format!("cannot read on: {e}")),
        }
    }

    pub(super) fn bytes(&mut self, length: u64) -> Step<Vec<u8>> {
        // Grows as data arrives, so a false length costs nothing.
        let mut out = Vec::new();
        if let Err(e) = (&mut self.reader).take(length).read_to_end(&mut out) {
            return self.error(format!("cannot read on: {e}"));
        }
        self.at += out.len() as u64;
        if out.len() as u64 == length { Ok(out) } else { self.error("the file ends within a string") }
    }

    pub(super) fn line(&mut self) -> Step<String> {
        let mut out = Vec::new();
        if let Err(e) = (&mut self.reader).take(MAX_LINE as u64).read_until(b'\n', &mut out) {
            return self.error(format!("cannot read on: {e}"));
        }
        self.at += out.len() as u64;
        if out.pop() != Some(b'\n') {
            return self.error("a line has no end");
        }
        String::from_utf8(out).or_else(|_| self.error("a line is not UTF-8"))
    }

    pub(super) fn u8(&mut self) -> Step<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u32(&mut self) -> Step<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Step<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn add(&mut self, node: Node) -> Step<Id> {
        if self.nodes.len() >= MAX_NODES {
            return self.error("more than a million values");
        }
        self.nodes.push(node);
        Ok((self.nodes.len() - 1) as Id)
    }

    pub(super) fn push(&mut self, node: Node) -> Step<()> {
        let id = self.add(node)?;
        self.push_id(id)
    }

    pub(super) fn push_id(&mut self, id: Id) -> Step<()> {
        // Only DUP and GET add to the stack without adding a value.
        if self.stack.len() >= 4 * MAX_NODES {
            return self.error("the stack is too deep");
        }
        self.stack.push(id);
        Ok(())
    }

    pub(super) fn leaf(&mut self, value: Value) -> Step<()> {
        self.push(Node::Leaf(value))
    }

    pub(super) fn text(&mut self, bytes: Vec<u8>) -> Step<()> {
        match String::from_utf8(bytes) {
            Ok(text) => self.leaf(Value::Str(text.into())),
            Err(_) => self.error("a string is not UTF-8"),
        }
    }

    /// Python 2 strings are text or bytes; only their contents can tell.
    pub(super) fn old_string(&mut self, bytes: Vec<u8>) -> Step<()> {
        match String::from_utf8(bytes) {
            Ok(text) => self.leaf(Value::Str(text.into())),
            Err(e) => self.leaf(Value::Bytes(e.into_bytes().into())),
        }
    }

    pub(super) fn pop(&mut self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return self.error("takes a value from an empty stack");
        }
        Ok(self.stack.pop().unwrap_or(NONE))
    }

    pub(super) fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(&id) if self.stack.len() > floor => Ok(id),
            _ => self.error("needs a value on an empty stack"),
        }
    }

    pub(super) fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => self.error("needs a mark where there is none"),
        }
    }

    pub(super) fn pairs(&self, ids: &[Id]) -> Step<Vec<(Id, Id)>> {
        match ids.as_chunks::<2>() {
            (pairs, []) => Ok(pairs.iter().map(|&[k, v]| (k, v)).collect()),
            _ => self.error("a dictionary has a key without a value"),
        }
    }

    pub(super) fn node(&self, id: Id) -> &Node {
        // Every id comes from `add`, or is one of the four that are always there.
        &self.nodes[id as usize]
    }
}
