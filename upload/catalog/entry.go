package catalog

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Token remembers what a request with a client token led to: the same request
// again leads to the same.
type Token struct {
	Digest  string    `json:"digest"` // hex SHA-256 of what was asked for
	Result  string    `json:"result"` // id of what it made
	Created time.Time `json:"created"`
}

// Prefixes of keys (FORMAT.md §4).
const (
	keyImage   = "image/"   // + id: the record
	keyName    = "name/"    // + owner / name: ref to the id
	keyAt      = "at/"      // + SHA-256 of the location / id: ref to the id
	keyPair    = "keypair/" // + owner / name
	keyPairID  = "keyid/"   // + id: ref to owner / name
	keyAccount = "account/" // + id
	keyAlias   = "alias/"   // + alias: ref to the account's id
	keyToken   = "token/"   // + owner / action / token
	keyClaim   = "claim/"   // + SHA-256 of the location
	keyStore   = "store/"   // + owner / image's id / SHA-256 of the bucket and key
)

func imageKey(id string) string            { return keyImage + id }
func nameKey(owner, name string) string    { return keyName + owner + "/" + name }
func atPrefix(location string) string      { return keyAt + digestOf(location) + "/" }
func pairKey(owner, name string) string    { return keyPair + owner + "/" + name }
func tokenKey(owner, act, t string) string { return keyToken + owner + "/" + act + "/" + t }
func claimKey(location string) string      { return keyClaim + digestOf(location) }

// check holds an entry against the rules for its kind.
func (e *entry) check() error {
	values := 0
	for _, is := range []bool{e.Image != nil, e.KeyPair != nil, e.Account != nil, e.Token != nil, e.Claim != nil, e.Ref != "", e.StoreTask != nil} {
		if is {
			values++
		}
	}
	if values != 1 {
		return fmt.Errorf("%d values", values)
	}
	kind, rest, _ := strings.Cut(e.Key, "/")
	wrong := errors.New("the key is not its value's")
	switch kind + "/" {
	case keyImage:
		if e.Image == nil || e.Image.ID != rest {
			return wrong
		}
		return e.Image.check()
	case keyPair:
		if e.KeyPair == nil || e.KeyPair.Owner+"/"+e.KeyPair.Name != rest {
			return wrong
		}
		return e.KeyPair.check()
	case keyAccount:
		if e.Account == nil || e.Account.ID != rest {
			return wrong
		}
		return e.Account.check()
	case keyToken:
		if e.Token == nil || !isHex(e.Token.Digest, 64) {
			return wrong
		}
		return errors.Join(checkText("token", rest, 1, 256), checkText("result", e.Token.Result, 0, 1024), checkTime("created", e.Token.Created))
	case keyClaim:
		if e.Claim == nil || digestOf(e.Claim.Location) != rest {
			return wrong
		}
		return e.Claim.check()
	case keyStore:
		if e.StoreTask == nil || e.StoreTask.key() != e.Key {
			return wrong
		}
		return e.StoreTask.check()
	case keyName, keyAt, keyPairID, keyAlias:
		if e.Ref == "" {
			return wrong
		}
		return errors.Join(checkText("key", rest, 1, 512), checkText("ref", e.Ref, 1, 512))
	}
	return errors.New("a key of no kind that is known")
}
