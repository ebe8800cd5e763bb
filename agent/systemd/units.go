package systemd

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/task"
)

// Slice is that of all workers: limits put on it hold for them together.
const Slice = "instar.slice"

// TaskUnit is the unit of a task's worker.
func TaskUnit(id string) string { return "instar-task-" + id + ".service" }

// SecretCredential is the name of the credential with the S3 secret key.
const SecretCredential = "secret-key"

// Units runs workers as transient units: they outlive the agent, have cgroups
// of their own, for limits and to be frozen, and credentials that are in no
// environment and on no command line.
type Units struct {
	Conn *Conn
	// Command is the worker's, to which the job's arguments are added.
	Command []string
	Env     []string
	// SecretKeyFile is handed over as a credential, decrypted if Encrypted.
	SecretKeyFile string
	Encrypted     bool
}

// stopTime is how long a worker has to end before it is killed.
const stopTime = 2 * time.Minute

// startTime is how long a worker may take to begin.
const startTime = 5 * time.Minute

// Launch starts a worker's unit and returns when the worker has its task.
func (u *Units) Launch(ctx context.Context, j task.Job) error {
	err := u.Conn.Run(ctx, TaskUnit(j.ID), u.properties(j)...)
	if exists(err) {
		return nil // an agent before this one started it
	}
	return err
}

// capabilities are those of a worker: it reads every file, makes snapshots and
// views of the volume, freezes filesystems, and writes to stores that are
// directories and to its own.
const capabilities = 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH | 1<<unix.CAP_FOWNER | 1<<unix.CAP_CHOWN | 1<<unix.CAP_SYS_ADMIN |
	1<<unix.CAP_MKNOD | 1<<unix.CAP_FSETID | 1<<unix.CAP_SETFCAP | 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_KILL | 1<<unix.CAP_SYS_NICE

func (u *Units) properties(j task.Job) []Property {
	argv := append(append([]string(nil), u.Command...), j.Args()...)
	p := []Property{
		Prop("Description", j.Description),
		Prop("Slice", Slice),
		Prop("Type", "notify"),
		Prop("ExecStart", Exec(argv...)),
		Prop("Environment", u.Env),
		Prop("CollectMode", "inactive-or-failed"),
		Prop("KillMode", "mixed"),
		Prop("TimeoutStartUSec", uint64(startTime.Microseconds())),
		Prop("TimeoutStopUSec", uint64(stopTime.Microseconds())),
		Prop("OOMScoreAdjust", int32(500)), // what it captures matters more than the capture
		// No namespace of mounts: what is captured is what the system sees.
		Prop("CapabilityBoundingSet", uint64(capabilities)),
		Prop("NoNewPrivileges", true),
		Prop("LockPersonality", true),
		Prop("MemoryDenyWriteExecute", true),
		Prop("RestrictRealtime", true),
		Prop("UMask", uint32(0o077)),
	}
	l := j.Limits
	if l.CPUWeight > 0 {
		p = append(p, Prop("CPUWeight", uint64(l.CPUWeight)))
	}
	if l.CPUQuota > 0 { // microseconds of each second
		p = append(p, Prop("CPUQuotaPerSecUSec", uint64(l.CPUQuota)*10000))
	}
	if l.IOWeight > 0 {
		p = append(p, Prop("IOWeight", uint64(l.IOWeight)))
	}
	if l.ReadRate > 0 {
		p = append(p, Prop("IOReadBandwidthMax", []struct {
			Path string
			Rate uint64
		}{{j.Volume, uint64(l.ReadRate)}}))
	}
	if l.Memory > 0 {
		p = append(p, Prop("MemoryHigh", uint64(l.Memory)))
	}
	if !l.Foreground {
		p = append(p, Prop("CPUSchedulingPolicy", int32(unix.SCHED_IDLE)), Prop("IOSchedulingClass", int32(3)), Prop("Nice", int32(19)))
	}
	return append(p, u.credential()...)
}

// Stop asks a worker to end.
func (u *Units) Stop(ctx context.Context, id string) error {
	if err := u.Conn.Thaw(ctx, TaskUnit(id)); err != nil {
		return err
	}
	return u.Conn.stopLater(ctx, TaskUnit(id))
}

// Freeze makes a worker stand still.
func (u *Units) Freeze(ctx context.Context, id string) error { return u.Conn.Freeze(ctx, TaskUnit(id)) }

// Thaw lets it go on.
func (u *Units) Thaw(ctx context.Context, id string) error { return u.Conn.Thaw(ctx, TaskUnit(id)) }

// GuardUnit is the unit of a standstill's guard.
func GuardUnit(id string) string { return "instar-guard-" + id + ".service" }

// GuardProperties are those of a guard's unit, which ends what stands still
// even if the guard is killed, hangs, or the memory is short.
func GuardProperties(argv []string, limit time.Duration) []Property {
	n := len(argv) - 1
	undo := append(append([]string(nil), argv[:n]...), "--undo", argv[n])
	return []Property{
		Prop("Description", "Instar: what stands still around a capture goes on after it"),
		Prop("Type", "notify"),
		Prop("ExecStart", Exec(argv...)),
		Prop("ExecStopPost", Exec(undo...)),
		Prop("CollectMode", "inactive-or-failed"),
		Prop("TimeoutStartUSec", uint64(startTime.Microseconds())),
		Prop("TimeoutStopUSec", uint64(stopTime.Microseconds())),
		Prop("RuntimeMaxUSec", uint64((limit + 30*time.Second).Microseconds())), // it hangs, then
		Prop("OOMScoreAdjust", int32(-900)),
		Prop("NoNewPrivileges", true),
		Prop("LockPersonality", true),
		Prop("MemoryDenyWriteExecute", true),
		Prop("RestrictRealtime", true),
		Prop("CapabilityBoundingSet", uint64(1<<unix.CAP_SYS_ADMIN|1<<unix.CAP_DAC_OVERRIDE|1<<unix.CAP_DAC_READ_SEARCH|1<<unix.CAP_FOWNER)),
		Prop("UMask", uint32(0o077)),
	}
}
