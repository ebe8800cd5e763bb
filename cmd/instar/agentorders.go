package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/orders"
	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/settings"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/metadata/imds"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// How an agent takes what a catalog asks of its machine.

type agentOrdersOptions struct {
	agentPlaces
	settings, secretKeyFile string
}

// newAgentOrders is the command of the unit that looks for a catalog's requests.
func newAgentOrders(a *app) *cobra.Command {
	o := agentOrdersOptions{agentPlaces: newAgentPlaces()}
	cmd := a.command("orders", "take what a catalog asks of this machine", `
Looks for BundleInstance and CreateImage requests of the catalog that tasks-from
in agent.yaml names, and has the agent do them. It is the agent that starts it,
as a unit of its own: the agent itself reaches no network. Without tasks-from it
ends at once.`, "", func(ctx context.Context) error {
		set, err := a.settingsOf(o.settings)
		if err != nil || set.TasksFrom == nil {
			return err
		}
		return a.takeOrders(ctx, set.TasksFrom, o.agentPlaces, o.secretKeyFile, a.ui.Log())
	})
	cmd.Hidden = true
	f := flagsOf(cmd)
	const test = "agent-orders"
	f.text(&o.socket, "socket", "", "the agent's socket, a `PATH`", ofUs, test)
	f.text(&o.state, "state", "", "the agent's `DIR`", ofUs, test)
	f.text(&o.settings, "settings", "", "the agent's settings `FILE`", ofUs, test)
	f.text(&o.secretKeyFile, "secret-key-file", "", "read the S3 secret key from `FILE`", ofUs, test)
	return cmd
}

// ordersDir is where it is remembered what was taken from a catalog.
func (o *agentPlaces) orders() string { return filepath.Join(o.state, "orders") }

// takeOrders takes a catalog's requests until ctx ends. What is not there yet, as
// metadata or the store, is waited for.
func (a *app) takeOrders(ctx context.Context, from *settings.TasksFrom, at agentPlaces, secretKeyFile string, log zerolog.Logger) error {
	b := *a // what is set here is of this store alone
	b.conf = a.conf.Clone()
	st := imageStore{storage: storage{bucket: from.Store, secretKeyFile: a.credentialFile(secretKeyFile)}}
	trust, err := b.orderSigners(from, &st)
	if err != nil {
		return err
	}
	every := time.Duration(from.Interval)
	if every == 0 {
		every = orders.DefaultInterval
	}
	o := orders.Options{
		Instance: from.Instance, Rules: from.Rules(), Agent: orderAgent{server.NewClient(at.socket)}, Dir: at.orders(), Interval: every,
		Report: func(e orders.Event) { logOrder(log, e) },
	}
	if o.Host, err = os.Hostname(); err != nil {
		return err
	}
	if o.Instance == "" {
		if err := again(ctx, every, log, "asking metadata for this instance's id", func() (err error) {
			o.Instance, err = instanceID(ctx, from.Metadata)
			return err
		}); err != nil {
			return err
		}
	}
	var store upload.Store
	if err := again(ctx, every, log, "opening the catalog's store", func() (err error) {
		store, err = b.orderStore(ctx, &st)
		return err
	}); err != nil || ctx.Err() != nil {
		return err
	}
	defer store.Close()
	o.Queue = tasks.Open(tasks.Options{Store: store, Signers: trust})
	taker, err := orders.Open(o)
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	log.Info().Str("store", store.String()).Str("instance", o.Instance).Msg("taking a catalog's tasks")
	return taker.Run(ctx)
}

// orderSigners are whose requests are followed. A line that lets a key sign for
// whatever purpose was not written with this one in mind, and does not count.
func (a *app) orderSigners(from *settings.TasksFrom, st *imageStore) (*keys.AllowedSigners, error) {
	read := func() (*keys.AllowedSigners, error) { return trusted(a.machineKeys(st, "", false)) }
	if from.Signers != "" {
		read = func() (*keys.AllowedSigners, error) { return keys.ReadAllowedSigners(from.Signers) }
	}
	trust, err := read()
	if err != nil {
		return nil, withHint(&exitError{code: exitFile, err: fmt.Errorf("tasks-from: signers: %w", err)},
			"It lists the key of the catalog's server: INSTANCE-OR-PATTERN namespaces=%q PUBLIC-KEY.", tasks.Namespace)
	}
	return keys.NewAllowedSigners(slices.DeleteFunc(trust.Entries(), func(e keys.AllowedSigner) bool { return e.Namespaces == "" })...), nil
}

func (a *app) orderStore(ctx context.Context, st *imageStore) (upload.Store, error) {
	url, err := imageStoreURL(st.bucket)
	if err != nil {
		return nil, err
	}
	return a.openBucket(ctx, &st.storage, url, false)
}

// again tries until it succeeds or ctx ends, and says once what is in the way.
func again(ctx context.Context, every time.Duration, log zerolog.Logger, what string, try func() error) error {
	trouble := ""
	for {
		err := try()
		if err == nil || ctx.Err() != nil {
			return nil
		}
		if err.Error() != trouble {
			trouble = err.Error()
			log.Error().Err(err).Msg(what + ": this is tried again")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
	}
}

// metadataTime is how long metadata may take to say whose instance this is.
const metadataTime = 20 * time.Second

func instanceID(ctx context.Context, endpoint string) (string, error) {
	client, err := imds.New(imds.Options{Endpoint: endpoint, TokensOnly: true})
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, metadataTime)
	defer cancel()
	id, err := client.Get(ctx, "instance-id")
	if err == nil && !tasks.ValidInstance(id) {
		err = fmt.Errorf("%.200q is no instance's id", id)
	}
	return id, err
}

func logOrder(log zerolog.Logger, e orders.Event) {
	l := log.Info()
	if e.Err != nil {
		l = log.Warn().Err(e.Err)
	}
	if e.Order != "" {
		l = l.Str("catalog_task", e.Order)
	}
	if e.Task != "" {
		l = l.Str("task", e.Task)
	}
	l.Msg("catalog: " + e.Text)
}

// credentialFile is the file with the S3 secret key: the one that is given, or
// systemd's credential.
func (a *app) credentialFile(given string) string {
	if d := a.getenv("CREDENTIALS_DIRECTORY"); d != "" && given == "" {
		if file := filepath.Join(d, systemd.SecretCredential); isFile(file, "credential") == nil {
			return file
		}
	}
	return given
}

// orderAgent is the agent, asked over its socket.
type orderAgent struct{ c *server.Client }

// Start starts a task.
func (g orderAgent) Start(ctx context.Context, r task.Request) (task.Task, error) {
	t, err := g.c.Start(ctx, r)
	if s := status(err); s == http.StatusBadRequest || s == http.StatusConflict {
		err = fmt.Errorf("%w: %w", orders.ErrRefused, err)
	}
	return t, err
}

// Show asks for a task.
func (g orderAgent) Show(ctx context.Context, id string) (task.Task, error) {
	t, err := g.c.Show(ctx, id)
	return t, notFound(err)
}

// Cancel ends a task.
func (g orderAgent) Cancel(ctx context.Context, id string) error {
	_, err := g.c.Cancel(ctx, id)
	if status(err) == http.StatusConflict { // it has ended
		return nil
	}
	return notFound(err)
}

// status is that of the agent's answer, if it is an error; else 0.
func status(err error) int {
	var e *server.Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

func notFound(err error) error {
	if status(err) == http.StatusNotFound {
		return fmt.Errorf("%w: %w", task.ErrNotFound, err)
	}
	return err
}

// runOrders takes a catalog's requests beside an agent: under systemd a unit does,
// elsewhere this process.
func (a *app) runOrders(ctx context.Context, o *agentRunOptions, set *settings.Settings, settingsFile, socket string, launcher task.Launcher, log zerolog.Logger) error {
	if set.TasksFrom == nil {
		return nil
	}
	units, ok := launcher.(*systemd.Units)
	if !ok {
		return a.takeOrders(ctx, set.TasksFrom, agentPlaces{socket: socket, state: o.state}, set.SecretKeyFile, log)
	}
	command := []string{units.Command[0], "agent", "orders", "--state", o.state, "--settings", settingsFile, "--socket", socket}
	if a.configFile != "" {
		command = append(command, "--config", a.configFile)
	}
	writable := []string{o.state}
	b := *a
	b.conf = a.conf.Clone()
	if dir := b.imageStoreDir(&imageStore{storage: storage{bucket: set.TasksFrom.Store}}); dir != "" {
		writable = append(writable, "-"+dir) // once it is there
	}
	if err := units.RunOrders(ctx, command, writable); err != nil && ctx.Err() == nil {
		log.Error().Err(err).Msg("nothing is taken from the catalog")
		return nil
	}
	<-ctx.Done()
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	conn, err := systemd.Connect(end) // the agent's own connection has ended with ctx
	if err == nil {
		err = conn.Stop(end, systemd.OrdersUnit)
		conn.Close()
	}
	if err != nil {
		log.Warn().Err(err).Msg("what takes a catalog's tasks may go on")
	}
	return nil
}
