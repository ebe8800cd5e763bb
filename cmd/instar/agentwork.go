package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/quiesce"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
)

type agentWorkOptions struct {
	agentPlaces
	settings, secretKeyFile string
	runtime                 string
	rate                    int64
	readShare               int
	idle                    bool
}

// newAgentWork is the command that a task's unit runs.
func newAgentWork(a *app) *cobra.Command {
	o := agentWorkOptions{agentPlaces: newAgentPlaces(), runtime: agentRuntime}
	cmd := a.command("work ID", "do a task of the agent", `
Does a task that an agent has taken, and writes what it does and how it ended
beside it. It is the agent that starts it.`, "", nil)
	cmd.Hidden = true
	cmd.Args = exactArgs(a, 1, "usage: agent work ID")
	f := flagsOf(cmd)
	const test = "agent"
	f.text(&o.state, "state", "", "the agent's `DIR`", ofUs, test)
	f.text(&o.settings, "settings", "", "the agent's settings `FILE`", ofUs, test)
	f.text(&o.runtime, "runtime", "", "`DIR` for what does not outlive the system", ofUs, test)
	f.text(&o.secretKeyFile, "secret-key-file", "", "read the S3 secret key from `FILE`", ofUs, test)
	f.size(&o.rate, "limit-rate", "", "send at most `SIZE` a second", ofUs, test)
	f.number(&o.readShare, "read-share", "", "spend at most `PERCENT` of the time reading files", ofUs, test)
	f.yes(&o.idle, "idle", "", "take what CPU and disk nobody else wants", ofUs, test)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return runAgentWork(cmd.Context(), a, &o, args[0]) }
	return cmd
}

func runAgentWork(ctx context.Context, a *app, o *agentWorkOptions, id string) error {
	dir := task.Dir(o.tasks())
	lock, err := dir.Lock(id)
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	defer lock.Close()
	t, err := dir.Load(id)
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	if t.State.Ended() || t.State == task.Cancelling {
		return failf(exitUsage, "task %s is %s", id, t.State)
	}
	if o.idle {
		if err := task.StepBack(); err != nil {
			return err
		}
	}
	w := &worker{a: a, o: o, t: t, dir: dir}
	if w.out, err = dir.Output(id, w.seen); err != nil {
		return failf(exitFile, "%w", err)
	}
	defer w.out.Close()
	if err := task.Ready(); err != nil {
		return err
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	res := w.run(ctx)
	if err := dir.SaveResult(id, res); err != nil {
		return failf(exitFile, "%w", err)
	}
	if res.Failure != nil {
		return failf(res.Exit, "task %s: %s", id, res.Failure.Message)
	}
	return nil
}

// worker does one task.
type worker struct {
	a   *app
	o   *agentWorkOptions
	t   *task.Task
	dir task.Dir
	out *task.Output

	cancel  context.CancelCauseFunc // of the capture
	hold    *quiesce.Hold           // nil while nothing stands still
	held    bool                    // it did
	stage   task.Stage
	failure *task.Failure
	result  *task.Result
	release func() // the lock against shutdown; nil if it is not held
}

// run makes the capture.
func (w *worker) run(ctx context.Context) *task.WorkResult {
	args, err := w.args()
	if err != nil {
		return failed(exitUsage, err)
	}
	ctx, w.cancel = context.WithCancelCause(ctx)
	defer w.cancel(nil)
	inner := newApp(append([]string{"instar"}, args...), strings.NewReader(""), w.out, w.out, w.a.getenv)
	inner.onProgress = func(label string, total int64) { w.begin(ctx, label, total) }
	inner.snapshotted = w.letGo
	code := inner.run(ctx, append([]string{"instar"}, args...))
	w.letGo()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return failed(exitOther, cause)
	}
	if w.release != nil {
		w.release()
	}
	res := &task.WorkResult{Exit: code}
	switch {
	case (code == exitOK || code == exitChanged) && w.result != nil:
		res.Result = w.result
		res.Result.Changed = code == exitChanged
		w.prune(ctx)
	case w.failure != nil:
		res.Failure = w.failure
		res.Failure.Exit = code
	default:
		res.Failure = &task.Failure{Code: task.CodeCapture, Message: fmt.Sprintf("the capture ended with exit status %d and did not say why", code), Exit: code}
	}
	return res
}

func failed(code int, err error) *task.WorkResult {
	f := &task.Failure{Code: task.CodeCapture, Message: err.Error(), Exit: code}
	var e *exitError
	if errors.As(err, &e) {
		f.Hint = e.hint
	}
	return &task.WorkResult{Exit: code, Failure: f}
}

// prune removes the older versions that the request does not keep. What cannot
// be removed is a warning: the capture is published, and the next one tries again.
func (w *worker) prune(ctx context.Context) {
	p := w.t.Request.Retention
	if p == nil || ctx.Err() != nil {
		return
	}
	w.stage = task.Tidying
	w.tell(task.Line{Type: "stage", Stage: task.Tidying, Phase: "removing what retention does not keep"})
	args := []string{"--json", "images", "prune", w.t.Request.Name}
	for _, k := range []struct {
		option string
		n      int
	}{{"last", p.Last}, {"daily", p.Daily}, {"weekly", p.Weekly}, {"monthly", p.Monthly}, {"yearly", p.Yearly}} {
		if k.n > 0 {
			args = append(args, fmt.Sprintf("--keep-%s=%d", k.option, k.n))
		}
	}
	for _, k := range p.Keep {
		args = append(args, "--keep-described="+k)
	}
	if s := w.t.Request.Store; s != "" {
		args = append(args, "--store="+s)
	}
	args = append(args, w.where()...)
	inner := newApp(append([]string{"instar"}, args...), strings.NewReader(""), w.out, w.out, w.a.getenv)
	if inner.run(ctx, append([]string{"instar"}, args...)) != exitOK {
		w.tell(task.Line{Type: "warning", Message: "retention: not all was removed that is not to be kept"})
	}
}

// begin is told of each phase of a capture before it begins.
func (w *worker) begin(ctx context.Context, label string, total int64) {
	word, _, _ := strings.Cut(label, " ")
	stage := map[string]task.Stage{
		"looking": task.Preparing, "reading": task.Preparing, "capturing": task.Reading, "bundling": task.Reading,
		"storing": task.Finishing, "publishing": task.Publishing,
	}[word]
	if stage == "" {
		stage = w.stage
	}
	w.stage = stage
	w.tell(task.Line{Type: "stage", Stage: stage, Phase: label, Total: total})
	switch {
	case word == "reading":
		w.standStill(ctx)
	case stage == task.Finishing || stage == task.Publishing: // all of the volume is read
		w.letGo()
	}
	if stage == task.Publishing && w.release == nil {
		w.inhibit(ctx)
	}
}

// inhibit holds a shutdown up while the image appears: it takes seconds, and
// cut short it would have to be begun again.
func (w *worker) inhibit(ctx context.Context) {
	if !systemd.Running() && w.a.getenv("DBUS_SYSTEM_BUS_ADDRESS") == "" {
		return
	}
	f, err := systemd.Inhibit(ctx, "shutdown:sleep", "publishing "+w.t.Request.Name, "block")
	if err != nil {
		w.tell(task.Line{Type: "status", Message: err.Error()})
		return
	}
	w.release = func() { f.Close() }
}

func (w *worker) tell(l task.Line) {
	// A log that cannot be written ends in a capture that cannot tell either,
	// and in a result that cannot be kept: it is said there.
	_ = w.out.Tell(l)
}

// seen looks at what the command tells.
func (w *worker) seen(kind string, line []byte) {
	switch kind {
	case "error":
		var e struct{ Message, Hint string }
		if json.Unmarshal(line, &e) == nil {
			w.failure = &task.Failure{Code: task.CodeCapture, Message: e.Message, Hint: e.Hint}
		}
	case "image":
		var r struct {
			Manifest   string
			Store      string
			Sequence   uint64
			Size       int64
			BytesRead  int64  `json:"bytes_read"`
			BytesAdded int64  `json:"bytes_added"`
			FilesRead  int64  `json:"files_read"`
			Unchanged  int64  `json:"files_unchanged"`
			Kernel     string `json:"kernel"`
		}
		if json.Unmarshal(bytes.TrimSpace(line), &r) == nil {
			w.result = &task.Result{
				Manifest: r.Manifest, Location: r.Store, Sequence: r.Sequence, Size: r.Size, BytesRead: r.BytesRead,
				BytesAdded: r.BytesAdded, FilesRead: r.FilesRead, FilesSkipped: r.Unchanged, Kernel: r.Kernel,
			}
		}
	case "pruned":
		var r struct{ Removed int }
		if json.Unmarshal(line, &r) == nil && w.result != nil {
			w.result.Pruned = r.Removed
		}
	case "bundle":
		var r struct {
			Manifest string
			Digest   string
			Size     int64
			Bundled  int64 `json:"bundled_size"`
		}
		if json.Unmarshal(line, &r) == nil {
			w.result = &task.Result{Manifest: r.Digest, Location: r.Manifest, Size: r.Size, BytesAdded: r.Bundled}
		}
	}
}

// args are the command line of the task. Every value stands behind its
// option's name and an equals sign, so none can be taken for an option.
func (w *worker) args() ([]string, error) {
	r := &w.t.Request
	args := []string{"--json"}
	opt := func(name string, values ...string) {
		for _, v := range values {
			if v != "" {
				args = append(args, "--"+name+"="+v)
			}
		}
	}
	yes := func(name string, v bool) {
		if v {
			args = append(args, "--"+name)
		}
	}
	if r.Kind == task.Bundle {
		args = append(args, "bundle-vol")
		if r.Store == "" && w.a.conf.Get("store").Text == "" {
			return nil, usagef("a bundle needs a store, BUCKET/PREFIX: neither the request nor config.yaml says one")
		}
		opt("prefix", r.Name)
		opt("bucket", r.Store)
		opt("privatekey", r.PrivateKey)
		opt("cert", r.Certificate)
		opt("ec2cert", r.EC2Cert)
		opt("user", r.User)
		opt("kernel", r.KernelID)
		opt("ramdisk", r.RamdiskID)
		yes("replace", r.Replace)
	} else {
		args = append(args, "create-image")
		opt("name", r.Name)
		opt("store", r.Store)
		opt("description", r.Description)
		opt("domain", r.Domain)
		opt("expires", r.Expires)
		opt("recipient", r.Recipients...)
		yes("full", r.Full)
		yes("verify-content", r.VerifyContent)
		yes("no-kernel", r.NoKernel)
	}
	opt("volume", r.Volume)
	opt("arch", r.Architecture)
	opt("exclude", r.Exclude...)
	opt("include", r.Include...)
	q, err := w.quiesce()
	if err != nil {
		return nil, err
	}
	// Who stands still waits for the last byte: that is not the time to be gentle.
	if asked := r.Limits != nil && r.Limits.ReadShare > 0; w.o.readShare > 0 && (asked || q.Zero()) {
		opt("read-share", strconv.Itoa(w.o.readShare))
	}
	return append(args, w.where()...), nil
}

// where are the options that say which service the store is at, who asks, and
// how fast.
func (w *worker) where() []string {
	r := &w.t.Request
	var args []string
	opt := func(name, v string) {
		if v != "" {
			args = append(args, "--"+name+"="+v)
		}
	}
	opt("config", w.a.configFile)
	opt("url", r.Endpoint)
	opt("region", r.Region)
	opt("secret-key-file", w.a.credentialFile(w.o.secretKeyFile))
	store := r.Store
	if store == "" {
		store = w.a.conf.Get("store").Text
	}
	if w.o.rate > 0 && !strings.HasPrefix(store, "/") && !strings.HasPrefix(store, "file:") { // a directory has no network to spare
		opt("limit-rate", strconv.FormatInt(w.o.rate, 10))
	}
	return args
}
