package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/internal/durable"
	"github.com/instar-image/instar/upload/catalog"
)

func runKeysCreate(ctx context.Context, a *app, o *keysOptions, name string) error {
	tags, err := tagsOf(o.tags)
	if err != nil {
		return err
	}
	if o.out != "" {
		if _, err := os.Lstat(o.out); err == nil {
			return failf(exitFile, "--out: %w: %s", fs.ErrExist, o.out)
		}
	} else if a.json {
		return usagef("--json needs --out FILE: a private key is no field of a message")
	}
	return a.inAccount(ctx, &o.catalogOptions, func(k *openedCatalog, call catalog.Call) error {
		pair, private, err := k.CreateKeyPair(ctx, call, name, o.kind, tags)
		if err != nil {
			return err
		}
		if o.out == "" {
			if _, err := a.stdout.Write(private); err != nil {
				return err
			}
			a.ui.Say("made %s (%s): the private key is shown this once", pair.Name, pair.ID)
			return nil
		}
		if err := durable.Create(o.out, 0o600, private); err != nil {
			_, derr := k.DeleteKeyPair(ctx, call, pair.Name, "")
			return errors.Join(failf(exitFile, "writing the private key: %w", err), derr)
		}
		return a.ui.Result("key_pair", pairText(pair), pairFields(pair))
	})
}

func pairText(k *catalog.KeyPair) string {
	return fmt.Sprintf("%s  %s  %s  %s", k.ID, k.Type, k.Fingerprint, k.Name)
}

func pairFields(k *catalog.KeyPair) ui.Fields {
	return ui.Fields{"key_pair_id": k.ID, "name": k.Name, "type": k.Type, "fingerprint": k.Fingerprint, "public_key": k.PublicKey, "created": k.Created, "tags": k.Tags}
}

func runKeysImport(ctx context.Context, a *app, o *keysOptions, name, file string) error {
	tags, err := tagsOf(o.tags)
	if err != nil {
		return err
	}
	if err := isFile(file, "the public key"); err != nil {
		return err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return failf(exitFile, "reading the public key: %w", err)
	}
	return a.inAccount(ctx, &o.catalogOptions, func(k *openedCatalog, call catalog.Call) error {
		pair, err := k.ImportKeyPair(ctx, call, name, data, tags)
		if err != nil {
			return err
		}
		return a.ui.Result("key_pair", pairText(pair), pairFields(pair))
	})
}

func runKeysList(ctx context.Context, a *app, o *keysOptions, names []string) error {
	return a.lookAs(ctx, &o.catalogOptions, func(_ *openedCatalog, v *catalog.View, account string) error {
		missing := slices.Clone(names)
		for pair, err := range v.KeyPairs(ctx, account) {
			if err != nil {
				return err
			}
			if len(names) > 0 && !slices.Contains(names, pair.Name) {
				continue
			}
			missing = slices.DeleteFunc(missing, func(n string) bool { return n == pair.Name })
			if err := a.ui.Result("key_pair", pairText(pair), pairFields(pair)); err != nil {
				return err
			}
		}
		if len(missing) > 0 {
			return failf(exitFile, "there is no key pair %s", shown(strings.Join(missing, ", ")))
		}
		return nil
	})
}

func runKeysDelete(ctx context.Context, a *app, o *keysOptions, names []string) error {
	return a.inAccount(ctx, &o.catalogOptions, func(k *openedCatalog, call catalog.Call) error {
		for _, n := range names {
			gone, err := k.DeleteKeyPair(ctx, call, n, "")
			if err != nil {
				return err
			}
			text, f := "there was no key pair "+shown(n), ui.Fields{"name": n, "deleted": gone != nil}
			if gone != nil {
				text, f["key_pair_id"] = "deleted "+gone.ID+" "+n, gone.ID
			}
			if err := a.ui.Result("deleted", text, f); err != nil {
				return err
			}
		}
		return nil
	})
}
