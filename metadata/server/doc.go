// Package server runs a metadata handler: listeners, limits, logs, metrics,
// control and an orderly end.
//
// What goes in: a [metadata.Handler] and [Options]. What comes out: nothing;
// [Run] returns when it is told to stop. It opens the sockets it is told to
// and those that systemd hands over, and writes the access log it is given,
// the control socket and the state directory.
package server
