// Package boot makes a machine that started without Instar's initrd its
// instance's own, in stages that systemd orders: who this is, SSH keys, user
// data, and the end. It uses what the initrd uses: package agent/inject, its
// journal and its record of keys; what the initrd has done is not done again.
//
// In go the metadata service's address and the root; out come lines about what
// was done. It touches what agent/inject touches, and the kernel's hostname.
// Where cloud-init is installed and enabled it stays in charge: nothing but
// the instance's facts in /run/instar is written then, and in the journal that
// cloud-init had this instance's identity and user data.
package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/agent/inject/journal"
	"github.com/instar-image/instar/agent/inject/userdata"
	"github.com/instar-image/instar/metadata/imds"
)

// Stage is a part of the boot.
type Stage string

// The stages, in their order.
const (
	Network  Stage = "network"  // waits for metadata: identity, hostname, facts
	Keys     Stage = "keys"     // authorized_keys in step with metadata; may be repeated at any time
	UserData Stage = "userdata" // user data, at most once per instance id
	Final    Stage = "final"    // tells how the boot went
)

// Stages are all stages in their order.
func Stages() []Stage { return []Stage{Network, Keys, UserData, Final} }

// Options of the stages.
type Options struct {
	Root     string        // "": the running system's
	Run      string        // "": Root/run
	Endpoint string        // of the metadata service; "": the one the initrd asked, else [imds.DefaultEndpoint]
	User     string        // login user; "": the one the initrd was told, else root
	Wait     time.Duration // how long Network waits for metadata
	// Report is told each thing done, as one line without secrets.
	Report func(line string, warn bool)
	Output io.Writer // what user data prints

	exec func(ctx context.Context, argv []string, stdin io.Reader) error // of user data; nil runs it
}

// ErrStage is wrapped by an error about a stage that does not exist.
var ErrStage = errors.New("unknown stage")

// finalStep is the journal's name for the end of an instance's first boot.
const finalStep = "boot"

// run is one stage being run.
type run struct {
	Options
	client *imds.Client
	facts  map[string]string // of the initrd or an earlier stage; nil if there are none
	live   bool
}

// Run runs one stage. The error says what could not be done; Keys and Network
// do what they can beside that.
func Run(ctx context.Context, o Options, stage Stage) error {
	if !slices.Contains(Stages(), stage) {
		return fmt.Errorf("%w %q: there are network, keys, userdata and final", ErrStage, stage)
	}
	r, err := newRun(o)
	if err != nil {
		return err
	}
	switch stage {
	case Network:
		err = r.network(ctx)
	case Keys:
		err = r.keys(ctx)
	case UserData:
		err = r.userData(ctx)
	case Final:
		err = r.final(ctx)
	}
	if err != nil {
		return fmt.Errorf("boot stage %s: %w", stage, err)
	}
	return nil
}

func newRun(o Options) (*run, error) {
	r := &run{Options: o, live: o.Root == "" || filepath.Clean(o.Root) == "/"}
	if r.Root == "" {
		r.Root = "/"
	}
	root, err := filepath.Abs(r.Root)
	if err != nil {
		return nil, err
	}
	r.Root = root
	if r.Run == "" {
		r.Run = filepath.Join(r.Root, "run")
	}
	if r.Report == nil {
		r.Report = func(string, bool) {}
	}
	if r.Output == nil {
		r.Output = io.Discard
	}
	data, err := os.ReadFile(r.factsFile())
	if err == nil {
		err = json.Unmarshal(data, &r.facts)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("reading the instance's facts: %w", err)
	}
	if r.Endpoint == "" {
		r.Endpoint = r.facts["metadata"]
	}
	if r.User == "" {
		r.User = r.facts["user"]
	}
	if r.client, err = imds.New(imds.Options{Endpoint: r.Endpoint, TokensOnly: true}); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *run) factsFile() string { return filepath.Join(r.Run, "instar", "instance.json") }

func (r *run) say(format string, args ...any) { r.Report(fmt.Sprintf(format, args...), false) }

// who asks metadata for the instance's id, which is that of the stages before.
func (r *run) who(ctx context.Context) (string, error) {
	id, err := r.client.Get(ctx, "instance-id")
	if err != nil {
		return "", err
	}
	if before := r.facts["instance-id"]; before != "" && before != id {
		return "", fmt.Errorf("metadata says that this is instance %q, where it was %q when the machine started; nothing is done", id, before)
	}
	return id, nil
}

// wait asks who this is until there is an answer or Wait has passed.
func (r *run) wait(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, max(r.Wait, time.Second))
	defer cancel()
	pause := 250 * time.Millisecond
	told := false
	for {
		id, err := r.who(ctx)
		if err == nil || !errors.Is(err, imds.ErrUnreachable) && !errors.Is(err, imds.ErrRefused) {
			return id, err
		}
		if !told {
			told = true
			r.Report("waiting for metadata: "+err.Error(), true)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("no metadata within %v: %w", r.Wait, err)
		case <-time.After(pause):
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// network learns who this is, and makes the machine that one.
func (r *run) network(ctx context.Context) error {
	id, err := r.wait(ctx)
	if err != nil {
		return err
	}
	in := inject.Instance{ID: id, Facts: map[string]string{"metadata": r.Endpoint}}
	if r.Endpoint == "" {
		in.Facts["metadata"] = imds.DefaultEndpoint
	}
	if r.User != "" {
		in.Facts["user"] = r.User
	}
	leaf := func(path string) string {
		v, e := r.client.Get(ctx, path)
		if e != nil && !errors.Is(e, imds.ErrNotFound) {
			err = errors.Join(err, e)
		}
		return v
	}
	for _, f := range []struct{ name, path string }{
		{"ami-id", "ami-id"},
		{"instance-type", "instance-type"},
		{"availability-zone", "placement/availability-zone"},
		{"region", "placement/region"},
		{"local-ipv4", "local-ipv4"},
	} {
		if v := leaf(f.path); v != "" {
			in.Facts[f.name] = v
		}
	}
	if in.Hostname = leaf("local-hostname"); in.Hostname == "" {
		in.Hostname = leaf("hostname")
	}
	if err != nil {
		return err
	}
	r.say("this is instance %s", id)
	steps := []inject.Step{inject.StepIdentity, inject.StepHostname, inject.StepFacts}
	cloudInit, err := r.cloudInit()
	if err != nil {
		return err
	}
	if cloudInit {
		steps = []inject.Step{inject.StepFacts}
		err = inject.LeftToCloudInit(r.Root, id)
	}
	_, aerr := inject.Apply(ctx, r.apply(steps...), in)
	return errors.Join(err, aerr)
}

func (r *run) apply(steps ...inject.Step) inject.Options {
	return inject.Options{Root: r.Root, Run: r.Run, Report: r.Report, Steps: steps, Live: r.live}
}

// cloudInit tells, also the operator, whether cloud-init is in charge.
func (r *run) cloudInit() (bool, error) {
	is, err := inject.CloudInit(r.Root)
	if is {
		r.say("cloud-init is installed and stays in charge of identity, keys and user data")
	}
	return is, err
}

// keys brings authorized_keys in step with metadata.
func (r *run) keys(ctx context.Context) error {
	if is, err := r.cloudInit(); is || err != nil {
		return err
	}
	id, err := r.who(ctx)
	if err != nil {
		return err
	}
	keys, err := r.client.PublicKeys(ctx)
	if err != nil {
		return err
	}
	_, err = inject.Apply(ctx, r.apply(inject.StepKeys), inject.Instance{ID: id, User: r.User, Keys: keys})
	return err
}

// userData runs the instance's user data.
func (r *run) userData(ctx context.Context) error {
	if is, err := r.cloudInit(); is || err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(r.Run, "instar", "user-data")); err == nil {
		r.say("user data is run by instar-user-data.service, which the initrd made")
		return nil
	}
	id, err := r.who(ctx)
	if err != nil {
		return err
	}
	data, err := r.client.UserData(ctx)
	if err != nil {
		return err
	}
	if len(data) == 0 {
		r.say("no user data")
		return nil
	}
	j, err := inject.OpenJournal(r.Root)
	if err != nil {
		return err
	}
	defer j.Close()
	dir := filepath.Join(r.Run, "instar")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return userdata.Run(ctx, userdata.Options{
		Root: r.Root, Dir: dir, Instance: id, User: r.User, Journal: j, Client: userdata.NewClient(), Output: r.Output,
		Exec:   r.exec,
		Report: func(line string) { r.say("%s", line) },
	}, data)
}

// final tells how the boot went, with the fingerprints of the host keys: who
// logs in for the first time compares them with what the console shows.
func (r *run) final(ctx context.Context) error {
	id := r.facts["instance-id"]
	if id == "" {
		return errors.New("there are no facts of the instance: the stage network did not run")
	}
	j, err := inject.OpenJournal(r.Root)
	if err != nil {
		return err
	}
	defer j.Close()
	state := j.State(id, userdata.Step)
	switch {
	case slices.ContainsFunc(j.Records(), func(rec journal.Record) bool {
		return rec.Instance == id && rec.Step == userdata.Step && rec.Note == inject.CloudInitNote
	}):
		r.say("instance %s is ready; user data was left to cloud-init", id)
	case state == "":
		r.say("instance %s is ready; it ran no user data", id)
	case state == journal.Finished:
		r.say("instance %s is ready; user data: finished", id)
	default:
		r.Report(fmt.Sprintf("instance %s is ready; user data: %s", id, state), true)
	}
	if j.State(id, finalStep) != "" {
		return nil
	}
	for _, k := range hostKeys(r.Root) {
		r.say("SSH host key %s", k)
	}
	if err := j.Begin(id, finalStep); err != nil {
		return err
	}
	return j.End(id, finalStep, false, "")
}

// Adopt records that the machine, as it is, is its instance's: the next boots
// make no new host keys for it and run no user data. It is for machines on
// which Instar is installed while they are in use.
func Adopt(ctx context.Context, o Options) (string, error) {
	r, err := newRun(o)
	if err != nil {
		return "", err
	}
	id, err := r.wait(ctx)
	if err != nil {
		return "", err
	}
	if err := inject.Adopt(r.Root, id, "adopted", string(inject.StepIdentity), userdata.Step, finalStep); err != nil {
		return "", err
	}
	return id, nil
}
