//! Model, objective, optimizer and step loop.
