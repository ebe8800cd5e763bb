package main

import (
	"context"
	"os"
	"path/filepath"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/storesource"
	"github.com/instar-image/instar/upload"
)

func newMetadataSeal(a *app) *cobra.Command {
	var record, key, store string
	var recipients []string
	cmd := a.command("seal", "put a signed and sealed instance record into a store", `
Checks an instance's YAML file, seals it to the metadata servers' age
recipients, signs it with an SSH key (as "ssh-keygen -Y sign -n
instar-instance" does) and puts it into the store that "metadata serve
--instances URL" reads. Files the record names are not taken along.`,
		"  instar metadata seal --record web-1.yaml --key ~/.ssh/id_ed25519 --recipient age1... --store s3://bucket/fleet",
		func(ctx context.Context) error {
			for option, v := range map[string]string{"--record": record, "--key": key, "--store": store} {
				if err := need(v, option); err != nil {
					return err
				}
			}
			in, object, err := sealRecord(record, key, recipients)
			if err != nil {
				return err
			}
			s, err := upload.Open(ctx, store, upload.Options{
				Endpoint: a.conf.Get("endpoint").Text, Region: a.conf.Get("region").Text, CACertFile: a.conf.Get("ca_cert").Text, CreateDir: true,
			})
			if err != nil {
				return failf(exitS3, "%w", err)
			}
			defer s.Close()
			name := storesource.Prefix + in.ID
			if _, err := upload.PutBytes(ctx, s, name, object, upload.PutOptions{}); err != nil {
				return failf(exitS3, "%w", err)
			}
			return a.ui.Result("sealed", name+" in "+s.String(), ui.Fields{"instance-id": in.ID, "object": name, "store": s.String()})
		})
	f := flagsOf(cmd)
	const test = "metadata-serve"
	f.text(&record, "record", "", "the instance's YAML `FILE`", ofUs, test)
	f.text(&key, "key", "", "sign with the SSH private key in `FILE`", ofUs, test)
	f.list(&recipients, "recipient", "", "seal to an age `RECIPIENT`, age1...; may be repeated", ofUs, test)
	f.text(&store, "store", "", "`URL` of the store, as s3://bucket/fleet", ofUs, test)
	return cmd
}

func sealRecord(record, key string, to []string) (*metadata.Instance, []byte, error) {
	text, err := os.ReadFile(record)
	if err != nil {
		return nil, nil, failf(exitFile, "--record: %w", err)
	}
	in, err := metadata.Decode(filepath.Base(record), text, metadata.DecodeOptions{})
	if err != nil {
		return nil, nil, failf(exitFile, "%w", err)
	}
	private, err := os.ReadFile(key)
	if err != nil {
		return nil, nil, failf(exitFile, "--key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(private)
	if err != nil {
		return nil, nil, failf(exitFile, "--key %s: %w", key, err)
	}
	if len(to) == 0 {
		return nil, nil, usagef("missing option --recipient")
	}
	recipients := make([]age.Recipient, 0, len(to))
	for _, r := range to {
		if x, err := age.ParseX25519Recipient(r); err == nil {
			recipients = append(recipients, x)
		} else if pq, err := age.ParseHybridRecipient(r); err == nil {
			recipients = append(recipients, pq)
		} else {
			return nil, nil, usagef("--recipient %q is not an age recipient", r)
		}
	}
	object, err := storesource.Seal(text, signer, recipients...)
	if err != nil {
		return nil, nil, failf(exitOther, "%w", err)
	}
	return in, object, nil
}
