//! auth-demo
