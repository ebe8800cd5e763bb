package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/ec2api"
	"github.com/instar-image/instar/upload/catalog/server"
	"github.com/instar-image/instar/upload/catalog/tasks"
	"github.com/instar-image/instar/upload/catalog/web"
)

// The commands of a region's catalog.

func newCatalog(a *app) *cobra.Command {
	cmd := branch("catalog", "serve the images of a store to EC2's clients and to browsers", `
A catalog is the list of a region's registered images, kept in the very store
they lie in: under which id and name, whose they are, who may launch them.
"instar images register" and its sisters change it; "catalog serve" answers the
AWS command line, the SDKs and Packer, and shows it to people. docs/catalog.md
describes it and how to begin.`, `
  instar catalog create --store s3://images/fleet eu-home-1
  instar catalog serve --store s3://images/fleet --accounts accounts.yaml
  aws --endpoint-url http://127.0.0.1:8773 ec2 describe-images --owners self`)
	cmd.AddCommand(newCatalogCreate(a), newCatalogServe(a), newCatalogAccounts(a), newCatalogRenew(a))
	cmd.AddCommand(newCatalogVerbs(a)...)
	return cmd
}

type catalogCreateOptions struct {
	imageStore
	sign, expires string
}

func newCatalogCreate(a *app) *cobra.Command {
	var o catalogCreateOptions
	const test = "catalog"
	cmd := a.command("create REGION", "begin the catalog of a region in a store", `
Makes an empty catalog in a store, signed with this machine's key or the one of
--sign. REGION is its name, as clients will have it: eu-home-1. One that is
there already, of the same region, is left alone. The store must keep the
conditions of writes; one that does not is refused.

Who may change the catalog is what the readers' allowed_signers files say: keys
with the region's name, or *, and the namespace instar-catalog.

A store that keeps showing what was once the newest state is found out by readers
who have seen a newer one, and with --expires by all: each change is good for
that long then, "catalog serve" renews it when half of that is over, and so does
"catalog renew".`, `
  instar catalog create --store s3://images/fleet eu-home-1
  instar catalog create --store s3://images/fleet --expires 7d eu-home-1`, nil)
	cmd.Args = exactArgs(a, 1, "create takes one region: catalog create eu-home-1")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		span, err := catalogSpan(o.expires)
		if err != nil {
			return err
		}
		k, err := a.openCatalog(cmd.Context(), &o.imageStore, o.sign, true, func(c *catalog.Options) { c.Expires = span })
		if err != nil {
			return err
		}
		defer k.close()
		if _, err := k.trust.Check(k.signer.Public(), args[0], catalog.Namespace); err != nil {
			return withHint(&exitError{code: exitTrust, err: err}, "This line in the allowed_signers file allows it:\n%s", keys.AllowedSigner{
				Principals: "*", Namespaces: catalog.Namespace + "," + tasks.Namespace, Key: k.signer.Public(), Comment: a.keyComment(),
			})
		}
		if err := k.Create(cmd.Context(), args[0]); err != nil {
			return err
		}
		return a.ui.Result("catalog", fmt.Sprintf("%s: the catalog of %s", k.store, args[0]), ui.Fields{"store": k.store.String(), "region": args[0]})
	}
	f := flagsOf(cmd)
	f.text(&o.expires, "expires", "", "readers take no state for the newest that was signed more than `TIME` ago, 1h or more: 7d; servers renew it in time. Default for ever", ofUs, test)
	f.sign(&o.sign, test)
	o.imageStore.add(a, cmd, test)
	return cmd
}

type catalogServeOptions struct {
	imageStore
	sign                        string
	accounts                    string
	listen, zones, otherRegions []string
	tlsCert, tlsKey             string
	plain, readOnly             bool
	admin, accessLog            string
	endpoint                    string
	noWeb                       bool
	webAccount, webTitle        string
	connections                 int
}

const (
	catalogListen   = "127.0.0.1:8773" // EC2's endpoint had this port on Eucalyptus and OpenStack
	catalogAccounts = "catalog-accounts.yaml"
)

func newCatalogServe(a *app) *cobra.Command {
	o := catalogServeOptions{accessLog: "-", connections: 1024}
	const test = "TestCatalogServe"
	cmd := a.command("serve", "serve the EC2 API and a page for people", `
Answers the EC2 Query API over the catalog of a store, until it is stopped: the
AWS command line, the SDKs and Packer register, find, share, copy, tag and
deregister images with it. Every request must be signed (Signature Version 4)
with an access key of the accounts' file, which also says what an account may
do; docs/catalog.md describes it. Beside the API, at the same address, is a
read-only page to look for images.

The server keeps nothing but what is in the store: any number of them may serve
one catalog. Changes are signed with this machine's key or the one of --sign;
with --read-only there are none. BundleInstance and CreateImage are handed to
the instances' agents through the store.

It listens on loopback. Anywhere else it wants a certificate, since private keys
and secrets pass: --plain-http says that something in front has one.`, `
  instar catalog serve --store s3://images/fleet --accounts accounts.yaml
  instar catalog serve --store s3://images/fleet --listen :8773 --tls-cert cert.pem --tls-key key.pem
  instar catalog serve --store s3://images/fleet --other-region us-home-1=s3://images-us/fleet
  instar catalog serve --store ./store --accounts accounts.yaml --read-only --no-web`,
		func(ctx context.Context) error { return runCatalogServe(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.accounts, "accounts", "", "who may ask: YAML `FILE` of accounts and access keys; default "+catalogAccounts+" beside the machine's keys", ofUs, test)
	f.list(&o.listen, "listen", "", "serve at `ADDRESS:PORT`; default "+catalogListen, ofUs, test)
	f.text(&o.tlsCert, "tls-cert", "", "serve HTTPS with the certificate chain in `FILE`, PEM; read again when it changes", ofUs, test)
	f.text(&o.tlsKey, "tls-key", "", "the certificate's private key in `FILE`, PEM", ofUs, test)
	f.yes(&o.plain, "plain-http", "", "serve plain HTTP on addresses that are not loopback", ofUs, test)
	f.text(&o.sign, "sign", "", "sign changes with the SSH `KEY`; default the machine's own", ofUs, test)
	f.yes(&o.readOnly, "read-only", "", "change nothing: refuse all actions that would", ofUs, test)
	f.text(&o.endpoint, "endpoint", "", "tell clients that this region is at `HOST[:PORT]`; default what they called it by", ofUs, test)
	f.list(&o.zones, "zone", "", "the region has the availability zone `NAME`; default the region and 'a'", ofUs, test)
	f.list(&o.otherRegions, "other-region", "", "CopyImage may copy from `REGION=STORE`, the catalog of another region, by the same keys; REGION=STORE@HOST tells clients where it is served", ofUs, test)
	f.text(&o.admin, "admin", "", "serve /metrics, /healthz and /readyz at `ADDRESS:PORT`", ofUs, test)
	f.text(&o.accessLog, "access-log", "", "append a line of JSON per request to `FILE`; '-' is standard error, 'none' no log", ofUs, test)
	f.yes(&o.noWeb, "no-web", "", "serve the API alone", ofUs, test)
	f.text(&o.webAccount, "web-account", "", "show people what `ACCOUNT` may see; default public images. Whoever reaches the page sees it", ofUs, test)
	f.text(&o.webTitle, "web-title", "", "`TITLE` of the page", ofUs, test)
	f.number(&o.connections, "max-connections", "", "keep at most `N` connections open", ofUs, test)
	o.imageStore.add(a, cmd, test)
	completeFiles(cmd, "accounts", "yaml", "yml")
	completeFiles(cmd, "tls-cert", "pem", "crt")
	completeFiles(cmd, "tls-key", "pem", "key")
	return cmd
}

func (o *catalogServeOptions) check() error {
	if len(o.listen) == 0 && os.Getenv("LISTEN_FDS") == "" {
		o.listen = []string{catalogListen}
	}
	if (o.tlsCert == "") != (o.tlsKey == "") {
		return usagef("--tls-cert and --tls-key go together")
	}
	for _, l := range o.listen {
		host, _, err := net.SplitHostPort(l)
		if err != nil {
			return usagef("--listen %q: want ADDRESS:PORT, as in %s", l, catalogListen)
		}
		ip := net.ParseIP(host)
		if o.tlsCert == "" && !o.plain && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return usagef("--listen %s is not loopback: give --tls-cert and --tls-key, or --plain-http if TLS ends in front of it", l)
		}
	}
	if o.noWeb && (o.webAccount != "" || o.webTitle != "") {
		return usagef("--web-account and --web-title are for the page, which --no-web leaves out")
	}
	if o.webAccount != "" && catalog.CheckAccount(o.webAccount) != nil {
		return usagef("--web-account %q is no account: 12 digits", o.webAccount)
	}
	return nil
}

func runCatalogServe(ctx context.Context, a *app, o *catalogServeOptions) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	log := zerolog.New(a.stderr).With().Timestamp().Logger()
	if o.accounts == "" {
		o.accounts = filepath.Join(a.keyDir(), catalogAccounts)
	}
	accounts, err := openAccounts(ctx, o.accounts, log)
	if err != nil {
		return err
	}
	defer accounts.keep(ctx)()
	k, err := a.openCatalog(ctx, &o.imageStore, o.sign, !o.readOnly, func(c *catalog.Options) {
		c.Missed = func(err error) { log.Warn().Err(err).Msg("the image is available without it") }
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	view, err := k.View(ctx)
	if errors.Is(err, catalog.ErrNoCatalog) {
		return withHint(err, "'instar catalog create --store %s REGION' begins one.", k.store)
	} else if err != nil {
		return err
	}
	so := server.Options{
		Listen: o.listen, Activation: os.Getenv("LISTEN_FDS") != "", TLSCert: o.tlsCert, TLSKey: o.tlsKey, Admin: o.admin,
		Log: log, Limits: server.Limits{Connections: o.connections},
		API: ec2api.Options{
			Catalog: k.Catalog, Accounts: accounts.get, Region: view.Region(), Endpoint: o.endpoint, Zones: o.zones,
			ReadOnly: o.readOnly,
		},
	}
	if k.signer != nil {
		if _, err := k.trust.Check(k.signer.Public(), "i-0", tasks.Namespace); err != nil {
			log.Warn().Err(err).Msg("BundleInstance and CreateImage are refused: the allowed_signers file does not let this server's key give tasks (namespace " + tasks.Namespace + ")")
		} else {
			so.API.Tasks = tasks.Open(tasks.Options{Store: k.store, Signer: k.signer, Signers: k.trust})
		}
	}
	if !o.noWeb {
		so.Web = &web.Options{Catalog: k.Catalog, Account: o.webAccount, Title: o.webTitle}
	}
	others, err := a.otherRegions(ctx, o, view.Region())
	if err != nil {
		return err
	}
	for _, r := range others {
		defer func() { err = errors.Join(err, r.close()) }()
		so.API.Regions = append(so.API.Regions, r.Region)
	}
	so.API.Sources = func(_ context.Context, region string) (*catalog.Catalog, error) {
		i := slices.IndexFunc(others, func(r otherRegion) bool { return r.Name == region })
		if i < 0 {
			return nil, nil
		}
		return others[i].Catalog, nil
	}
	access, done, err := openAccessLog(a, o.accessLog)
	if err != nil {
		return err
	}
	defer done()
	so.AccessLog = access
	return server.Run(ctx, so)
}

// otherRegion is a catalog that images may be copied from.
type otherRegion struct {
	ec2api.Region
	*openedCatalog
}

func (a *app) otherRegions(ctx context.Context, o *catalogServeOptions, own string) ([]otherRegion, error) {
	var out []otherRegion
	for _, s := range o.otherRegions {
		name, rest, ok := strings.Cut(s, "=")
		store, host := rest, ""
		if i := strings.LastIndexByte(rest, '@'); i >= 0 && !strings.Contains(rest[i:], "/") {
			store, host = rest[:i], rest[i+1:]
		}
		if !ok || catalog.CheckRegion(name) != nil || store == "" || name == own {
			return nil, usagef("--other-region %q: want REGION=STORE or REGION=STORE@HOST, of another region than %s", s, own)
		}
		there := o.imageStore
		there.bucket = store
		k, err := a.openCatalog(ctx, &there, "", false)
		if err != nil {
			return nil, err
		}
		if host == "" {
			host = o.endpoint
		}
		out = append(out, otherRegion{ec2api.Region{Name: name, Endpoint: host}, k})
	}
	return out, nil
}
