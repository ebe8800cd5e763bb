// Package serving is the life of a server around its handlers: where it
// listens, whom it lets in, what systemd is told of it, what it tells those who
// run it, and how it ends.
//
// What goes in: HTTP servers with their listeners, a way to know that they
// work, and how long the end may take. What comes out: nothing; [Run] returns
// when it is told to stop and what was under way has ended. The package touches
// the sockets it is told to open, those that systemd hands over, and systemd's
// notification socket.
package serving
