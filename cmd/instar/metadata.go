package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/dirsource"
	"github.com/instar-image/instar/metadata/launch"
	"github.com/instar-image/instar/metadata/server"
	"github.com/instar-image/instar/metadata/storesource"
	"github.com/instar-image/instar/metadata/sts"
	"github.com/instar-image/instar/upload"
)

// The commands of the metadata server.

// Where the metadata server's things are unless options say otherwise.
const (
	metadataInstances = "/etc/instar/instances"
	metadataState     = "/var/lib/instar/metadata"
	metadataControl   = "/run/instar/metadata.sock"
)

func newMetadata(a *app) *cobra.Command {
	cmd := branch("metadata", "serve EC2 instance metadata to your own machines", `
Serves what EC2 serves at 169.254.169.254: cloud-init, the AWS SDKs and scripts
find their instance's metadata, credentials and user data there. Each instance
is a YAML file; docs/metadata.md describes it and how to begin.`, `
  instar metadata check /etc/instar/instances
  instar metadata serve --listen 169.254.169.254
  instar metadata ctl list`)
	cmd.AddCommand(newMetadataServe(a), newMetadataCheck(a), newMetadataSeal(a), newMetadataCtl(a))
	return cmd
}

type serveOptions struct {
	instances, state, control, admin string
	accessLog, ec2Key                string
	signers, identity                string
	listen, hosts                    []string
	rate, burst, connections         int
}

func newMetadataServe(a *app) *cobra.Command {
	o := serveOptions{instances: metadataInstances, state: metadataState, control: metadataControl, accessLog: "-", rate: 500, connections: 16384}
	cmd := a.command("serve", "run the metadata server", `
Serves the instances described in a directory, one YAML file each, until it is
stopped. Files that change are taken up as a whole: while any of them is wrong,
the records of before are served, and the log and "metadata ctl status" say
what is wrong.

An instance is recognised by its source address, by the listener or interface
its requests come in on, or by both, and where its record asks for it by its
MAC address; never by anything in the request. On a network whose members may
forge addresses give each instance an interface of its own (--listen
169.254.169.254@tap0), or its record a MAC address.

Sockets that systemd hands over are served beside --listen; readiness, state
and watchdog are told to systemd.`, `
  ip address add 169.254.169.254/32 dev lo
  instar metadata serve --listen 169.254.169.254 --listen '[fd00:ec2::254]'
  instar metadata serve --listen 169.254.169.254@tap0 --listen 169.254.169.254@tap1
  instar metadata serve --instances ./instances --state ./state --control ./ctl.sock --listen 127.0.0.1:8080`,
		func(ctx context.Context) error { return runMetadataServe(ctx, a, &o) })
	f := flagsOf(cmd)
	const test = "metadata-serve"
	f.text(&o.instances, "instances", "", "`DIR` with one YAML file per instance, or the URL of a store with sealed records", ofUs, test)
	f.text(&o.signers, "signers", "", "with a store: allowed_signers `FILE`, who may sign which instances' records", ofUs, test)
	f.text(&o.identity, "identity", "", "with a store: `FILE` with the age identity that opens records", ofUs, test)
	f.list(&o.listen, "listen", "", "serve at `[NAME=]ADDRESS[:PORT][@INTERFACE]`; the port is 80 if not given", ofUs, test)
	f.text(&o.state, "state", "", "keep the identity key, events and withdrawn tickets in `DIR`; 'none' keeps nothing and signs nothing", ofUs, test)
	f.text(&o.control, "control", "", "make the control socket at `PATH`; 'none' for none", ofUs, test)
	f.text(&o.admin, "admin", "", "serve /metrics, /healthz and /readyz at `ADDRESS:PORT`", ofUs, test)
	f.text(&o.accessLog, "access-log", "", "append a line of JSON per request to `FILE`; '-' is standard error, 'none' no log", ofUs, test)
	f.number(&o.rate, "rate", "", "answer at most `N` requests a second to each instance; 0 is no limit", ofUs, test)
	f.number(&o.burst, "burst", "", "let `N` requests at once be within the rate; default twice the rate", ofUs, test)
	f.number(&o.connections, "max-connections", "", "keep at most `N` connections open", ofUs, test)
	f.text(&o.ec2Key, "ec2-key", "", "private key in `FILE` that opens EC2 bundles for launch tickets, PEM", ofUs, test)
	f.list(&o.hosts, "host", "", "accept `NAME` in the Host header, beside addresses, localhost and instance-data", ofUs, test)
	completeFiles(cmd, "instances")
	completeFiles(cmd, "state")
	return cmd
}

func runMetadataServe(ctx context.Context, a *app, o *serveOptions) error {
	so := server.Options{
		Activation: os.Getenv("LISTEN_FDS") != "", Admin: o.admin, Log: zerolog.New(a.stderr).With().Timestamp().Logger(),
		Limits: server.Limits{Connections: o.connections},
	}
	so.Metadata.Hosts = o.hosts
	if so.Metadata.Rate, so.Metadata.Burst = float64(o.rate), o.burst; o.rate == 0 {
		so.Metadata.Rate = -1
	}
	for _, s := range o.listen {
		l, err := server.ParseListen(s)
		if err != nil {
			return usagef("%w", err)
		}
		so.Listen = append(so.Listen, l)
	}
	if len(so.Listen) == 0 && !so.Activation {
		return usagef("missing option --listen, as in --listen 169.254.169.254")
	}
	if o.control != "none" {
		so.Control = o.control
	}
	if o.state != "none" {
		var err error
		if so.Metadata.State, err = server.OpenState(o.state); err != nil {
			return failf(exitFile, "%w", err)
		}
		if so.Metadata.Signer, err = server.OpenSigner(o.state); err != nil {
			return failf(exitFile, "%w", err)
		}
	}
	limitGarbage(256 << 20) // records are read with much of it, and may be many
	if err := addSource(ctx, a, &so, o); err != nil {
		return err
	}
	debug.FreeOSMemory()
	reload, watch := so.Reload, so.Watch
	so.Reload = func() error {
		err := reload()
		limitGarbage(so.Metadata.Source.Instances().Footprint())
		return err
	}
	so.Watch = func(ctx context.Context, after func(error)) error {
		limitGarbage(so.Metadata.Source.Instances().Footprint())
		return watch(ctx, func(err error) {
			limitGarbage(so.Metadata.Source.Instances().Footprint())
			after(err)
		})
	}
	if err := addLauncher(&so, o.ec2Key); err != nil {
		return err
	}
	access, done, err := openAccessLog(a, o.accessLog)
	if err != nil {
		return err
	}
	defer done()
	so.AccessLog = access
	return server.Run(ctx, so)
}

// addSource says where the records come from: a directory, or a store whose
// state is then shared with other servers.
func addSource(ctx context.Context, a *app, so *server.Options, o *serveOptions) error {
	if !strings.Contains(o.instances, "://") {
		if o.signers != "" || o.identity != "" {
			return usagef("--signers and --identity are for records in a store, as --instances s3://bucket/fleet")
		}
		dir, err := dirsource.Open(o.instances)
		if err != nil {
			return failf(exitFile, "%w", err)
		}
		so.Metadata.Source, so.Reload, so.Watch = dir, dir.Reload, dir.Watch
		return nil
	}
	if o.signers == "" || o.identity == "" {
		return usagef("records in a store need --signers, who may sign them, and --identity, what opens them")
	}
	allowed, err := os.ReadFile(o.signers)
	if err != nil {
		return failf(exitFile, "--signers: %w", err)
	}
	signers, err := storesource.ParseSigners(allowed)
	if err != nil {
		return failf(exitFile, "--signers: %w", err)
	}
	f, err := os.Open(o.identity)
	if err != nil {
		return failf(exitFile, "--identity: %w", err)
	}
	defer f.Close()
	identities, err := age.ParseIdentities(f)
	if err != nil {
		return failf(exitFile, "--identity: %w", err)
	}
	var recipients []age.Recipient
	for _, id := range identities {
		switch id := id.(type) {
		case *age.X25519Identity:
			recipients = append(recipients, id.Recipient())
		case *age.HybridIdentity:
			recipients = append(recipients, id.Recipient())
		}
	}
	store, err := upload.Open(ctx, o.instances, upload.Options{
		Endpoint: a.conf.Get("endpoint").Text, Region: a.conf.Get("region").Text, CACertFile: a.conf.Get("ca_cert").Text,
	})
	if err != nil {
		return failf(exitS3, "%w", err)
	}
	state, err := storesource.OpenState(ctx, store, identities, recipients)
	if err != nil {
		return failf(exitS3, "%w", err)
	}
	src, err := storesource.Open(ctx, storesource.Options{Store: store, Signers: signers, Identities: identities})
	if src == nil {
		return failf(exitS3, "%w", err)
	} else if err != nil { // the others are served
		so.Log.Error().Err(err).Msg("records were refused")
	}
	refresh := func(ctx context.Context) error { return errors.Join(src.Reload(ctx), state.Refresh(ctx)) }
	so.Metadata.Source, so.Metadata.State = src, state
	so.Reload = func() error { return refresh(ctx) }
	so.Watch = func(ctx context.Context, after func(error)) error {
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error { return src.Watch(ctx, after) })
		group.Go(func() error {
			return state.Watch(ctx, 5*time.Second, func(err error) { so.Log.Error().Err(err).Msg("the fleet's state was not refreshed") })
		})
		return group.Wait()
	}
	return nil
}

// addLauncher lets the server mint credentials and give out launch tickets.
func addLauncher(so *server.Options, ec2Key string) error {
	if so.Metadata.State == nil {
		so.Metadata.State = metadata.NewState()
	}
	so.Metadata.Keys = metadata.NewKeyRing(sts.Minter{})
	lo := launch.Options{State: so.Metadata.State, Keys: so.Metadata.Keys}
	if ec2Key != "" {
		key, err := keys.ReadPrivateKey(ec2Key)
		if err != nil {
			return failf(exitFile, "--ec2-key: %w", err)
		}
		lo.EC2Key = key
	}
	l, err := launch.New(lo)
	if err != nil {
		return err
	}
	so.Metadata.Launcher = l
	return nil
}

// limitGarbage lets about 48 MiB of garbage gather beside what the records
// take, however many they are: few collections for a few, little memory for
// many. GOGC in the environment has the last word.
func limitGarbage(live int64) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(int(min(max((48<<20)*100/max(live, 1), 15), 1600)))
	}
}

// openAccessLog opens the file that --access-log names; done closes it.
func openAccessLog(a *app, name string) (log io.Writer, done func(), err error) {
	switch name {
	case "none":
		return nil, func() {}, nil
	case "-":
		return a.stderr, func() {}, nil
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return nil, nil, failf(exitFile, "opening the access log: %w", err)
	}
	return f, func() { f.Close() }, nil // what could not be written was said
}

func newMetadataCheck(a *app) *cobra.Command {
	cmd := a.command("check [DIR]", "check instance files", `
Reads a directory of instance files as "metadata serve" does and names every
mistake with file and line: unknown keys, values that cannot be served, and
instances that could not be told apart. Nothing is changed.`,
		"  instar metadata check ./instances", nil)
	cmd.Args = atMostArgs(a, 1, "check takes one directory")
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		dir := metadataInstances
		if len(args) > 0 {
			dir = args[0]
		}
		d, err := dirsource.Open(dir)
		if err != nil {
			return failf(exitFile, "%w", err)
		}
		n := d.Instances().Len()
		return a.ui.Result("check", fmt.Sprintf("%s: %d instances, no mistakes", dir, n), ui.Fields{"directory": dir, "instances": n})
	}
	return cmd
}

// atMostArgs allows up to n arguments.
func atMostArgs(a *app, n int, otherwise string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) > n && !a.manual && !a.showVersion {
			return usagef("%s", otherwise)
		}
		return nil
	}
}

// exactArgs demands n arguments.
func exactArgs(a *app, n int, otherwise string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != n && !a.manual && !a.showVersion {
			return usagef("%s", otherwise)
		}
		return nil
	}
}

// parseEvent makes a change of the words of "metadata ctl event".
func parseEvent(now timeSource, words []string) (server.EventChange, error) {
	var c server.EventChange
	at := func(i int) string {
		if i < len(words) {
			return words[i]
		}
		return ""
	}
	var err error
	switch kind := at(0); {
	case kind == "spot" && len(words) == 3:
		c.Set.SpotAction = &metadata.SpotAction{Action: at(1)}
		c.Set.SpotAction.Time, err = now.parse(at(2))
	case kind == "rebalance" && len(words) <= 2:
		t, perr := now.parse(at(1))
		c.Set.Rebalance, err = &t, perr
	case kind == "lifecycle" && len(words) == 2:
		c.Set.Lifecycle = at(1)
	case kind == "maintenance" && len(words) >= 3:
		ev := metadata.MaintenanceEvent{Code: at(1), Description: strings.Join(words[3:], " "), State: "active"}
		ev.NotBefore, err = now.parse(at(2))
		ev.ID = "instance-event-" + strconv.FormatInt(ev.NotBefore.Unix(), 16)
		c.Set.Maintenance = &metadata.Maintenance{Scheduled: []metadata.MaintenanceEvent{ev}}
	case kind == "clear" && len(words) == 1:
		c.Clear = []string{"all"}
	case kind == "clear":
		c.Clear = words[1:]
	default:
		err = errors.New("an event is one of: spot ACTION TIME, rebalance [TIME], lifecycle STATE, maintenance CODE TIME [DESCRIPTION], clear [KIND …]")
	}
	return c, err
}
