// Package inject makes a captured root the root of one instance: SSH keys,
// hostname, machine-id, SSH host keys, an fstab that cannot stop the boot, and
// user data.
//
// In comes the directory of the root, mounted by the initrd or live, and what
// is known of the instance; out comes a report of what was done. On the root's
// disk it touches /etc/hostname, /etc/machine-id, /etc/fstab, /etc/ssh, the
// login user's authorized_keys and, in /var/lib/instar, Instar's journal and
// its record of the keys that came from metadata; all else goes to /run. Paths are resolved inside the root and cannot lead out of
// it; a user's files are written with that user's rights.
package inject

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject/inroot"
	"github.com/instar-image/instar/agent/inject/journal"
)

// Instance is what the metadata says of an instance.
type Instance struct {
	ID       string            // instance-id; required
	Hostname string            // "": the image's own stays
	User     string            // whose authorized_keys; "": root
	Keys     []string          // lines for authorized_keys, one key each
	UserData []byte            // as the metadata server gives it; nil if there is none
	Facts    map[string]string // for /run/instar/instance.json: no secrets
}

// Options say where an instance is made.
type Options struct {
	Root    string // directory of the root
	Run     string // directory that is, or will be, the root's /run; "": Root/run
	Program string // executable that understands "user-data", copied to /run/instar
	// Present tells whether the device of an fstab entry ("UUID=…",
	// "/dev/vdb") is there. nil leaves fstab alone.
	Present func(spec string) bool
	// RootSpec replaces the device of fstab's root line where that is absent.
	RootSpec string
	// Report is told each thing done, as one line without secrets. Warnings,
	// things that were not done and the boot can do without, come with warn set.
	Report func(line string, warn bool)
	// Steps are what is done of it; nil: everything.
	Steps []Step
	// Live says that Root is the running system's: the kernel gets the hostname
	// too, and the machine-id is what it was until the next boot; one that was
	// made in this boot stays.
	Live bool
}

// Step is a part of what Apply does.
type Step string

// The steps, in their order.
const (
	StepIdentity Step = "identity" // machine-id and SSH host keys
	StepHostname Step = "hostname"
	StepFstab    Step = "fstab"
	StepKeys     Step = "keys" // authorized_keys, in step with metadata
	StepFacts    Step = "facts"
	StepUserData Step = "user-data"
)

// Result is what Apply did.
type Result struct {
	New       bool     // first time for this instance id
	MachineID string   // of a new instance
	HostKeys  []string // public SSH host keys made, as in a .pub file
	KeysAdded int
	// KeysWithdrawn are lines removed: written for metadata before, which has
	// them no more.
	KeysWithdrawn int
	CloudInit     bool // cloud-init is in charge of keys, hostname and user data
}

// identityStep is the journal's name for machine-id and host keys; unlike user
// data it is repeated when it was interrupted.
const identityStep = string(StepIdentity)

// Apply makes the root in o that of the instance. It may be called on every
// boot: what is once per instance is done once per instance. Its error says
// what could not be done; what can be done beside that is done nevertheless.
func Apply(ctx context.Context, o Options, in Instance) (*Result, error) {
	if err := checkID(in.ID); err != nil {
		return nil, err
	}
	if o.Run == "" {
		o.Run = o.Root + "/run"
	}
	root, err := inroot.Open(o.Root)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	h := &hierarchy{root}
	a := &application{h: h, o: o, in: in, res: &Result{}}
	a.res.CloudInit = h.cloudInit()
	if err := a.checkKeys(); err != nil {
		a.errs = append(a.errs, err)
	}
	for _, step := range []struct {
		name Step
		do   func() error
	}{
		{StepIdentity, a.identity},
		{StepHostname, a.hostname},
		{StepFstab, a.fstab},
		{StepKeys, a.keys},
		{StepFacts, a.facts},
		{StepUserData, a.userData},
	} {
		if o.Steps != nil && !slices.Contains(o.Steps, step.name) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return a.res, err
		}
		if err := step.do(); err != nil {
			a.errs = append(a.errs, err)
		}
	}
	return a.res, errors.Join(a.errs...)
}

// checkID refuses an instance id that is no plain word: it stands in files.
func checkID(id string) error {
	if id == "" || len(id) > 128 {
		return fmt.Errorf("instance id %q is empty or longer than 128 bytes", id)
	}
	for _, c := range []byte(id) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return fmt.Errorf("instance id %q has a character other than letters, digits, '-', '_' and '.'", id)
		}
	}
	return nil
}

// hierarchy is the root at hand.
type hierarchy struct{ *inroot.Root }

type application struct {
	h    *hierarchy
	o    Options
	in   Instance
	res  *Result
	errs []error

	refused bool // a key of the instance was left aside
}

func (a *application) say(warn bool, format string, args ...any) {
	if a.o.Report != nil {
		a.o.Report(fmt.Sprintf(format, args...), warn)
	}
}

// identity makes the ids that two instances must not share.
func (a *application) identity() error {
	j, err := OpenJournal(a.o.Root)
	if err != nil {
		return err
	}
	defer j.Close()
	switch j.State(a.in.ID, identityStep) {
	case journal.Finished:
		return nil
	case "":
		a.res.New = true
		err = j.Begin(a.in.ID, identityStep)
	default:
		a.res.New = true
		a.say(true, "making the ids of instance %s was interrupted; they are made again", a.in.ID)
		err = j.Again(a.in.ID, identityStep)
	}
	if err != nil {
		return err
	}
	a.res.MachineID, err = a.machineID()
	if err == nil {
		host := a.in.Hostname
		if host == "" || CheckHostname(host) != nil {
			host = a.in.ID
		}
		a.res.HostKeys, err = a.h.freshHostKeys("root@" + host)
		for _, k := range a.res.HostKeys {
			a.say(false, "fresh SSH host key %s", k)
		}
	}
	if err != nil {
		return errors.Join(err, j.End(a.in.ID, identityStep, true, ""))
	}
	return j.End(a.in.ID, identityStep, false, "")
}

// machineID gives the root a machine-id of its own, and tells of it.
func (a *application) machineID() (string, error) {
	if a.o.Live {
		if id, ok := a.h.machineIDOfThisBoot(); ok {
			a.say(false, "machine-id %s, made in this boot", id)
			return id, nil
		}
	}
	if !a.o.Live {
		id, err := a.h.freshMachineID()
		if err == nil {
			a.say(false, "fresh machine-id %s", id)
		}
		return id, err
	}
	old, err := a.h.ReadFile("/etc/machine-id")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("reading the machine-id: %w", err)
	}
	id, err := a.h.freshMachineID()
	if err == nil && len(old) > 0 {
		err = keepMachineID(a.o.Root, a.o.Run, old)
	}
	if err == nil {
		a.say(false, "fresh machine-id %s, from the next boot on", id)
	}
	return id, err
}

func (a *application) hostname() error {
	if a.in.Hostname == "" || a.res.CloudInit {
		return nil
	}
	if err := a.h.setHostname(a.in.Hostname); err != nil {
		return fmt.Errorf("setting the hostname: %w", err)
	}
	if a.o.Live {
		if err := unix.Sethostname([]byte(a.in.Hostname)); err != nil {
			return fmt.Errorf("setting the running system's hostname: %w", err)
		}
	}
	a.say(false, "hostname %s", a.in.Hostname)
	return nil
}

func (a *application) fstab() error {
	if a.o.Present == nil {
		return nil
	}
	if err := a.h.settleFstab(a.o.Present, a.o.RootSpec, func(s string) { a.say(true, "%s", s) }); err != nil {
		return fmt.Errorf("settling fstab: %w", err)
	}
	return nil
}

// checkKeys leaves aside what is no plain public key.
func (a *application) checkKeys() error {
	var good []string
	var errs []error
	for i, k := range a.in.Keys {
		k = strings.TrimRight(k, "\r\n")
		if err := CheckKey(k, false); err != nil {
			errs = append(errs, fmt.Errorf("key %d of the instance: %w", i, err))
			continue
		}
		good = append(good, k)
	}
	a.in.Keys, a.refused = good, len(errs) > 0
	return errors.Join(errs...)
}

// Authorize adds lines, keys with or without options, to the authorized_keys
// of a user of the root directory, with that user's rights and keeping what is
// there. It reports how many were new; warn is told what may keep sshd from
// reading them.
func Authorize(root, user string, lines []string, warn func(string)) (int, error) {
	for _, l := range lines {
		if err := CheckKey(l, true); err != nil {
			return 0, fmt.Errorf("key for user %q: %w", user, err)
		}
	}
	r, err := inroot.Open(root)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	h := &hierarchy{r}
	return h.authorize(user, lines, warn)
}

func (a *application) facts() error {
	facts := map[string]string{"instance-id": a.in.ID}
	for k, v := range a.in.Facts {
		facts[k] = v
	}
	data, err := json.MarshalIndent(facts, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.o.Run, 0o755); err != nil {
		return err
	}
	if err := writeRun(a.o.Run, "instar/instance.json", append(data, '\n'), 0o755, 0o644); err != nil {
		return fmt.Errorf("writing the instance's facts: %w", err)
	}
	return nil
}

func (a *application) userData() error {
	if a.res.CloudInit {
		if err := seedCloudInit(a.o.Run, a.in); err != nil {
			return err
		}
		a.say(false, "cloud-init is installed and stays in charge; its seed is in /run/instar/seed")
		return LeftToCloudInit(a.o.Root, a.in.ID)
	}
	if len(a.in.UserData) == 0 {
		return nil
	}
	if !a.h.Exists("/lib/systemd/systemd") && !a.h.Exists("/usr/lib/systemd/systemd") {
		return errors.New("user data is not run: the image has neither cloud-init nor systemd")
	}
	if a.o.Program == "" {
		return errors.New("user data is not run: no program to run it with")
	}
	if err := layUnits(a.o.Run, a.o.Program, a.in); err != nil {
		return err
	}
	a.say(false, "user data of %d bytes handed to instar-user-data.service", len(a.in.UserData))
	return nil
}

const journalFile = "/var/lib/instar/journal"

// CloudInitNote is the journal's note of what cloud-init was in charge of.
const CloudInitNote = "left to cloud-init"

// LeftToCloudInit records identity and user data of an instance as cloud-init's:
// when cloud-init is switched off later, the same instance gets no other host
// keys, and its user data does not run a second time.
func LeftToCloudInit(root, id string) error {
	return Adopt(root, id, CloudInitNote, string(StepIdentity), string(StepUserData))
}

// Adopt records steps of an instance as done, with a note of how; those that the
// journal has anything about stay as they are.
func Adopt(root, id, note string, steps ...string) error {
	if err := checkID(id); err != nil {
		return err
	}
	j, err := OpenJournal(root)
	if err != nil {
		return err
	}
	defer j.Close()
	for _, step := range steps {
		if j.State(id, step) != "" {
			continue
		}
		if err := j.Begin(id, step); err != nil {
			return err
		}
		if err := j.End(id, step, false, note); err != nil {
			return err
		}
	}
	return nil
}

// CloudInit tells whether cloud-init is installed in the root directory and
// enabled: then it is in charge of keys, hostname and user data.
func CloudInit(root string) (bool, error) {
	r, err := inroot.Open(root)
	if err != nil {
		return false, err
	}
	defer r.Close()
	return (&hierarchy{r}).cloudInit(), nil
}

// ReadJournal looks at the journal of a root directory: see [journal.Read].
func ReadJournal(root string) (journal.View, error) {
	h, err := inroot.Open(root)
	if err != nil {
		return journal.View{}, err
	}
	defer h.Close()
	dir, err := h.OpenDir("/var/lib/instar")
	if errors.Is(err, fs.ErrNotExist) {
		return journal.View{}, nil
	}
	if err != nil {
		return journal.View{}, fmt.Errorf("opening the journal's directory: %w", err)
	}
	defer dir.Close()
	return journal.Read(dir)
}

// OpenJournal opens the journal of a root directory, making /var/lib/instar
// where it is absent.
func OpenJournal(root string) (*journal.Journal, error) {
	h, err := inroot.Open(root)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	if err := h.Mkdir("/var/lib/instar", 0o700); err != nil {
		return nil, fmt.Errorf("making the journal's directory: %w", err)
	}
	dir, err := h.OpenDir("/var/lib/instar")
	if err != nil {
		return nil, fmt.Errorf("opening the journal's directory: %w", err)
	}
	defer dir.Close()
	if err := ownedByRoot(dir); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	j, err := journal.Open(dir)
	if err != nil {
		return nil, err
	}
	f, err := h.OpenFile(journalFile)
	if err == nil {
		err = inroot.Label(f, dir, h.LabelFor(journalFile, false))
		f.Close()
	}
	if err != nil {
		return nil, errors.Join(err, j.Close())
	}
	return j, nil
}
