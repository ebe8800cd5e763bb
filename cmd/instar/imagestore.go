package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload"
)

// What the commands about Instar images share: the store they are in, and the
// machine's keys.

// imageStore is where images are and by which keys they are read.
type imageStore struct {
	storage             // its bucket is the store
	identities []string // files
	signers    string   // file
	cache      string   // place or directory
	cacheSize  int64
	makeBucket bool // of commands that write
}

func (o *imageStore) add(a *app, cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	o.addPlace(cmd, test)
	f.list(&o.identities, "identity", "", "open images with the age identity or SSH private key in `FILE` in place of the machine's own; may be repeated", ofUs, test)
	f.text(&o.signers, "signers", "", "believe whom the allowed_signers `FILE` lists; default "+machine.SignersFile+" beside the machine's keys", ofUs, test)
	o.addService(a, cmd, test)
}

func (o *imageStore) addPlace(cmd *cobra.Command, test string) {
	flagsOf(cmd).text(&o.bucket, "store", "", "where the images are: `STORE` is s3://BUCKET/PREFIX, BUCKET/PREFIX or a directory, /DIR or ./DIR", ofUs, test)
	completeFiles(cmd, "store")
}

// addService adds how the store is reached.
func (o *imageStore) addService(a *app, cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	f.text(&o.url, "url", "", "`URL` of the S3 service", ofUs, test)
	f.text(&a.region, "region", "", "`REGION` requests are signed for", ofUs, test)
	f.text(&o.accessKey, "access-key", "", "S3 access `KEY`", ofUs, test)
	f.text(&o.secretKeyFile, "secret-key-file", "", "read the S3 secret key from `FILE` (- is standard input)", ofUs, test)
	f.text(&o.caCert, "ca-cert", "", "trust the certificate authorities in `FILE` (PEM) for the endpoint", ofUs, test)
	completeFiles(cmd, "ca-cert", "pem", "crt")
	f.yes(&o.retry, "retry", "", "try failed requests up to 15 times; without it 8 times", ofUs, test)
	f.size(&o.rate, "limit-rate", "", "move at most `BYTES` a second, with k, m or g", ofUs, test)
}

// addMakeBucket adds the option of commands that may make a store.
func (o *imageStore) addMakeBucket(cmd *cobra.Command, test string) {
	flagsOf(cmd).yes(&o.makeBucket, "create-bucket", "", "make the store's bucket if it does not exist; a directory is always made", ofUs, test)
}

// addCache adds the options of commands that read much of an image.
func (o *imageStore) addCache(cmd *cobra.Command) { addCacheFlags(cmd, &o.cache, &o.cacheSize) }

func addCacheFlags(cmd *cobra.Command, place *string, size *int64) {
	f := flagsOf(cmd)
	f.text(place, "cache", "", "read by way of a `CACHE`: http://HOST:PORT or unix:/PATH of \"cache serve\", or a directory of your own, /DIR or ./DIR", ofUs, "cache")
	completeFiles(cmd, "cache")
	f.size(size, "cache-size", "", "of a directory: keep at most `BYTES`, with k, m or g; default 20g", ofUs, "cache")
}

// openImages opens the store. With create, a directory or bucket that does not
// exist is made.
func (a *app) openImages(ctx context.Context, o *imageStore, create bool) (upload.Store, error) {
	store := a.setting("store", "--store", o.bucket)
	if err := need(store, "--store"); err != nil {
		return nil, err
	}
	store, err := imageStoreURL(store)
	if err != nil {
		return nil, err
	}
	if dir := a.imageStoreDir(o); dir != "" {
		if idle := o.idle(a); len(idle) > 0 {
			a.ui.Say("note: the store is a directory, %s: nothing is made of %s", dir, strings.Join(idle, ", "))
		}
	}
	objects, err := a.openBucket(ctx, &o.storage, store, create)
	if err != nil {
		return nil, err
	}
	if !create {
		return a.cached(o, objects)
	}
	// That it can be written is found out by what is put there first.
	made, err := false, error(nil)
	if location := a.conf.Get("location").Text; o.makeBucket {
		made, err = upload.EnsureBucket(ctx, objects, location)
	} else {
		err = upload.FindBucket(ctx, objects, location)
	}
	switch {
	case errors.Is(err, upload.ErrNoBucket):
		return nil, errors.Join(withHint(asS3(err), "If its name is as it should be, --create-bucket makes it."), objects.Close())
	case errors.Is(err, upload.ErrAccess) && a.conf.Get("location").Text == "":
		a.ui.Debug("the bucket's location is not told", ui.Fields{"error": err.Error()})
	case err != nil:
		return nil, errors.Join(asS3(err), objects.Close())
	case made:
		a.ui.Say("made the bucket of %s", objects)
	}
	return objects, nil
}

// idle are the options that say how a bucket is reached, as far as they are given.
func (o *imageStore) idle(a *app) (names []string) {
	for _, x := range []struct {
		given bool
		name  string
	}{
		{o.url != "" && !strings.HasPrefix(o.url, "/") && !strings.HasPrefix(o.url, "file:"), "--url"},
		{a.region != "", "--region"},
		{o.accessKey != "", "--access-key"},
		{o.secretKeyFile != "", "--secret-key-file"},
		{o.caCert != "", "--ca-cert"},
		{o.retry, "--retry"},
		{o.makeBucket, "--create-bucket"},
	} {
		if x.given {
			names = append(names, x.name)
		}
	}
	return names
}

// imageStoreDir is the directory that a store is, "" if it is none.
func (a *app) imageStoreDir(o *imageStore) string {
	store, err := imageStoreURL(a.setting("store", "--store", o.bucket))
	if err != nil {
		return ""
	}
	_, dir, err := a.storeURL(&o.storage, store)
	if err != nil {
		return ""
	}
	return dir
}

// imageStoreURL makes a URL of a directory's path: one that begins with /, ./ or ../.
func imageStoreURL(s string) (string, error) {
	if !strings.HasPrefix(s, "/") && !strings.HasPrefix(s, "./") && !strings.HasPrefix(s, "../") && s != "." && s != ".." {
		return s, nil
	}
	dir, err := filepath.Abs(s)
	if err != nil {
		return "", failf(exitFile, "--store: %w", err)
	}
	return "file://" + dir, nil
}

// machineKeys are this machine's keys, which create makes where they are
// missing. signingKey is --sign, "" for the configured or the machine's own.
func (a *app) machineKeys(o *imageStore, signingKey string, create bool) *machine.Machine {
	mo := machine.Options{
		Dir: a.keyDir(), SigningKey: a.setting("signing_key", "--sign", signingKey), Signers: a.setting("signers", "--signers", o.signers),
		Create: create, Comment: a.keyComment(), AgentSocket: a.getenv("SSH_AUTH_SOCK"), Identities: o.identities,
		Ask: a.askPassphrase(),
	}
	if len(mo.Identities) == 0 {
		if id := a.conf.Get("identity").Text; id != "" {
			mo.Identities = []string{id}
		}
	}
	return machine.Open(mo)
}

// keyDir is where this machine's keys are: the machine's directory for root,
// else the user's.
func (a *app) keyDir() string {
	if os.Geteuid() == 0 || a.getenv("INSTAR_ETC") != "" || a.getenv("HOME") == "" {
		return a.etc()
	}
	return filepath.Join(a.getenv("HOME"), ".config", "instar")
}

// stateDir is where Instar remembers what it has seen of stores.
func (a *app) stateDir() string {
	switch {
	case a.getenv("INSTAR_STATE") != "":
		return a.getenv("INSTAR_STATE")
	case os.Geteuid() == 0 || a.getenv("HOME") == "":
		return "/var/lib/instar"
	case a.getenv("XDG_STATE_HOME") != "":
		return filepath.Join(a.getenv("XDG_STATE_HOME"), "instar")
	}
	return filepath.Join(a.getenv("HOME"), ".local", "state", "instar")
}

func (a *app) keyComment() string {
	name, err := os.Hostname()
	if err != nil || strings.ContainsAny(name, " \t\r\n") {
		return "instar"
	}
	return "instar@" + name
}

// openingKeys are what opening an image needs: identities and whose word counts.
func (a *app) openingKeys(m *machine.Machine) ([]*keys.Identity, *keys.AllowedSigners, error) {
	ids, err := m.Identities()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, withHint(&exitError{code: exitFile, err: err}, "--identity FILE names the age identity or SSH key that opens the image.")
	}
	if err != nil {
		return nil, nil, err
	}
	trust, err := trusted(m)
	return ids, trust, err
}

// trusted is whose word counts: all it takes to look at images from outside.
func trusted(m *machine.Machine) (*keys.AllowedSigners, error) {
	trust, err := m.Signers(nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, withHint(&exitError{code: exitFile, err: err}, "--signers FILE lists whose images are accepted, one a line: NAME-OR-* PUBLIC-KEY.")
	}
	return trust, err
}

// signer is the key that --sign names, or the machine's own, which must exist.
func (a *app) signer(ctx context.Context, o *imageStore, sign string) (keys.Signer, error) {
	s, err := a.machineKeys(o, sign, false).Signer(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, withHint(&exitError{code: exitFile, err: err}, "--sign KEY names the SSH key to sign with.")
	}
	return s, err
}

// checkSigner makes sure that what this machine signs will be believed by it.
func (a *app) checkSigner(m *machine.Machine, trust *keys.AllowedSigners, key ssh.PublicKey, names map[string]string) error {
	for namespace, name := range names {
		if _, err := trust.Check(key, name, namespace); err != nil {
			return withHint(&exitError{code: exitTrust, err: err}, "This line in %s allows it:\n%s", m.SignersFile(), machine.SignersLine(key, a.keyComment()))
		}
	}
	return nil
}

// showMade tells what keys were made.
func (a *app) showMade(m *machine.Machine) {
	for _, file := range m.Made() {
		a.ui.Say("made %s", file)
	}
	if len(m.Made()) > 0 {
		a.ui.Say("note: keep a copy of these files in a safe place: without them nobody opens the images, unless --recipient names somebody; no image contains them")
	}
}
