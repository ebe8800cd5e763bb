package ec2api

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// A MinIO does not tell the secrets of its users, and a signature for EC2
// cannot be handed to it for a check: its secret is needed here. The one way
// that is sound is the export an administrator makes of it:
//
//	mc admin cluster iam export ALIAS
//
// a zip of users with their secrets and of who has which policy. A user whose
// policies hold PREFIX and 12 digits has that account's rights; one with
// PREFIX, the digits and "-read-only" may only read.
const (
	minioUsers    = "iam-assets/users.json"
	minioMappings = "iam-assets/user_mappings.json"
	minioPolicy   = "instar-account-"
)

// maxExport is how many bytes of an export, and of a file in it, are read.
const maxExport = 64 << 20

func (a *Accounts) addMinIO(name, prefix string, accounts map[string]*account) error {
	if prefix == "" {
		prefix = minioPolicy
	}
	data, err := a.read(name, maxExport)
	if err != nil {
		return err
	}
	z, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return err
	}
	var users map[string]struct {
		SecretKey string `json:"secretKey"`
		Status    string `json:"status"`
	}
	var mappings map[string]struct {
		Policy string `json:"policy"`
	}
	if err := errors.Join(readJSON(z, minioUsers, &users), readJSON(z, minioMappings, &mappings)); err != nil {
		return err
	}
	for user, u := range users {
		if u.Status != "enabled" {
			continue
		}
		id, readOnly, err := accountOf(mappings[user].Policy, prefix)
		if err != nil {
			return fmt.Errorf("user %q: %w", user, err)
		}
		if id == "" {
			continue
		}
		acc := accounts[id]
		if acc == nil {
			acc = &account{id: id}
			accounts[id] = acc
		}
		if err := a.add(acc, keyFile{ID: user, Secret: u.SecretKey, ReadOnly: readOnly}, ""); err != nil {
			return fmt.Errorf("user %q: %w", user, err)
		}
	}
	return nil
}

// accountOf finds the account that a user's policies, separated by commas,
// name. Two accounts are a mistake.
func accountOf(policies, prefix string) (id string, readOnly bool, err error) {
	for p := range strings.SplitSeq(policies, ",") {
		rest, ok := strings.CutPrefix(strings.TrimSpace(p), prefix)
		if !ok {
			continue
		}
		digits, only := strings.CutSuffix(rest, "-read-only")
		if !accountID.MatchString(digits) {
			continue
		}
		if id != "" && id != digits {
			return "", false, fmt.Errorf("its policies name the accounts %s and %s", id, digits)
		}
		// Of a policy with and one without, the lesser right holds.
		id, readOnly = digits, readOnly || only
	}
	return id, readOnly, nil
}

func readJSON(z *zip.Reader, name string, into any) error {
	f, err := z.Open(name)
	if err != nil {
		return fmt.Errorf("the export: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxExport))
	if err != nil {
		return fmt.Errorf("%s of the export: %w", name, err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s of the export: %w", name, err)
	}
	return nil
}
