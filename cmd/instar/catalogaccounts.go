package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/catalog/ec2api"
	"github.com/instar-image/instar/upload/catalog/minioiam"
)

// Who may ask a catalog's server.

// keptAccounts are those of the accounts' file, and of the MinIO that it names.
// They are read anew when a file has changed, and MinIO is asked again and again;
// what is wrong leaves what was before, and says so.
type keptAccounts struct {
	name string
	log  zerolog.Logger

	mu  sync.Mutex
	now *ec2api.Accounts

	// The keeper's own.
	file   *ec2api.Accounts // without MinIO's users
	users  []minioiam.Key   // of the last answer
	until  time.Time        // they hold
	next   time.Time        // MinIO is asked
	failed string           // why the file cannot be read, said already
	silent string           // why MinIO does not answer, said already
}

// openAccounts reads the file, and asks MinIO once.
func openAccounts(ctx context.Context, name string, log zerolog.Logger) (*keptAccounts, error) {
	k := &keptAccounts{name: name, log: log}
	var err error
	if k.file, err = ec2api.ReadAccounts(name); err != nil {
		return nil, withHint(&exitError{code: exitFile, err: err}, "--accounts FILE says who may ask; docs/catalog.md describes it.")
	}
	if err := k.ask(ctx); err != nil {
		return nil, withHint(&exitError{code: exitS3, err: fmt.Errorf("accounts %s: %w", name, err)}, "The access key of minio: in the file needs a policy that allows admin:ExportIAM.")
	}
	k.renew()
	return k, nil
}

func (k *keptAccounts) get() *ec2api.Accounts {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.now
}

// accountsEvery is how often the accounts' files are looked at.
const accountsEvery = time.Second

// keep keeps the accounts current until ctx ends, or end is called.
func (k *keptAccounts) keep(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(accountsEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				k.look(ctx)
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

// look sees whether there is anything new.
func (k *keptAccounts) look(ctx context.Context) {
	changed := k.failed != "" || changedSince(k.file.Files())
	if changed {
		fresh, err := ec2api.ReadAccounts(k.name)
		switch {
		case err == nil:
			if before, m := k.file.MinIO(), fresh.MinIO(); m == nil || before == nil || before.URL != m.URL {
				k.users, k.until = nil, time.Time{} // another's users are nobody here
			}
			k.file, k.failed, k.next = fresh, "", time.Time{}
		case err.Error() != k.failed:
			k.failed = err.Error()
			k.log.Error().Err(err).Msg("the accounts cannot be read: those of before hold")
			changed = false
		default:
			changed = false
		}
	}
	asked := k.file.MinIO() != nil && !time.Now().Before(k.next)
	if asked {
		err := k.ask(ctx)
		switch {
		case err == nil:
			k.silent = ""
		case ctx.Err() == nil && err.Error() != k.silent:
			k.silent = err.Error()
			k.log.Error().Err(err).Time("until", k.until).Msg("MinIO does not tell its users: those of before hold until then")
		}
	}
	if changed || asked {
		before := k.get()
		k.renew()
		if changed {
			k.log.Info().Int("keys", k.get().Len()).Msg("the accounts were read anew")
		}
		k.tell(before)
	}
}

// ask asks MinIO for its users, if the file names one.
func (k *keptAccounts) ask(ctx context.Context) error {
	m := k.file.MinIO()
	if m == nil {
		return nil
	}
	began := time.Now()
	k.next = began.Add(m.Every)
	users, err := m.Keys(ctx, began)
	if err != nil {
		return err
	}
	k.users, k.until = users, began.Add(m.Keep)
	return nil
}

// renew makes the accounts of what is known.
func (k *keptAccounts) renew() {
	now := k.file
	if now.MinIO() != nil {
		now = now.With(k.users, k.until)
	}
	first := k.get() == nil
	k.mu.Lock()
	k.now = now
	k.mu.Unlock()
	if first {
		k.tell(nil)
	}
}

// tell says which keys of MinIO's are not taken, once for each reason.
func (k *keptAccounts) tell(before *ec2api.Accounts) {
	said := map[ec2api.Left]bool{}
	if before != nil {
		for _, l := range before.Left() {
			said[l] = true
		}
	}
	for _, l := range k.get().Left() {
		if !said[l] {
			k.log.Warn().Str("key", l.Key).Str("why", l.Why).Msg("an access key of MinIO's is not taken")
		}
	}
}

// changedSince says whether one of the files was changed at another time, or is gone.
func changedSince(files map[string]time.Time) bool {
	for name, at := range files {
		if st, err := os.Stat(name); err != nil || !st.ModTime().Equal(at) {
			return true
		}
	}
	return false
}

func newCatalogAccounts(a *app) *cobra.Command {
	var file string
	const test = "catalog-accounts"
	cmd := a.command("accounts", "say which access keys may ask a catalog's server", `
Reads the accounts' file of "instar catalog serve" as the server does, asks the
MinIO that it names for its users, and lists the access keys that would be
taken, with the account each stands for; then those of MinIO's that would not,
though a policy of theirs names an account, and why. Secrets are not shown.
docs/catalog.md describes the file.`, `
  instar catalog accounts
  instar catalog accounts --accounts accounts.yaml --json`,
		func(ctx context.Context) error { return runCatalogAccounts(ctx, a, file) })
	f := flagsOf(cmd)
	f.text(&file, "accounts", "", "YAML `FILE` of accounts and access keys; default "+catalogAccounts+" beside the machine's keys", ofUs, test)
	completeFiles(cmd, "accounts", "yaml", "yml")
	return cmd
}

func runCatalogAccounts(ctx context.Context, a *app, file string) error {
	if file == "" {
		file = filepath.Join(a.keyDir(), catalogAccounts)
	}
	k, err := openAccounts(ctx, file, zerolog.Nop())
	if err != nil {
		return err
	}
	now := k.get()
	for _, l := range now.List() {
		text := fmt.Sprintf("%s  %s", l.Account, l.Key)
		f := ui.Fields{"access_key_id": l.Key, "account": l.Account, "read_only": l.ReadOnly, "session_token": l.Token, "minio": l.MinIO}
		if l.ReadOnly {
			text += "  read-only"
		}
		if l.Token {
			text += "  with a session token"
		}
		switch {
		case l.MinIO && l.Parent != "":
			text += "  service account of MinIO's " + shown(l.Parent)
			f["parent"] = l.Parent
		case l.MinIO:
			text += "  user of MinIO's"
		case !l.Expires.IsZero():
			text += "  until " + stamp(l.Expires)
			f["expires"] = l.Expires
		}
		if err := a.ui.Result("access_key", text, f); err != nil {
			return err
		}
	}
	for _, l := range now.Left() {
		if err := a.ui.Result("not_taken", "not taken: "+shown(l.Key)+": "+l.Why, ui.Fields{"access_key_id": l.Key, "why": l.Why}); err != nil {
			return err
		}
	}
	return nil
}
