// Package metadata answers EC2 instance metadata requests for many instances:
// it is the server that cloud-init, the AWS SDKs and scripts expect at
// 169.254.169.254, for machines of your own.
//
// What goes in: instance records ([Instance]) from a [Source]: a directory of
// YAML files (package dirsource), an object store (package storesource) or a
// Go value ([Static]); and what changes while instances run ([State]).
// What comes out: an [http.Handler] made by [New]. Package server runs it.
//
// Who is calling is decided from the connection alone, never from a header:
// the source address, the listener or interface it came in on, and, where the
// record asks for it, the MAC address in the kernel's neighbour table.
//
// The package reads nothing but what records name (credential files), calls
// nothing but the STS endpoint a record names, and writes nothing but through
// State. It does not log: a [Reporter] is told of every request.
package metadata
