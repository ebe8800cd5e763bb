// Package systemd is what the agent has to do with systemd beyond what every
// server tells it: the units it asks it to start, stop, freeze and run tasks in,
// the lock against shutdown, and the units the agent itself is.
//
// In go names of units; out come changes of the system's state. The package
// talks to the system bus and, for installing, to the directory of unit files.
package systemd

import "github.com/coreos/go-systemd/v22/util"

// Running reports whether systemd is the init of this machine.
func Running() bool { return util.IsRunningSystemd() }
