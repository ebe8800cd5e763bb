package chunked

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/instar-image/instar/bundle/keys"
)

// Limits of lists of recipients: how many, and bytes of the document.
const (
	MaxRecipients     = 1000
	MaxRecipientsText = 8 << 20
)

const maxComment = 255

// Wrapped is a secret encrypted to one recipient.
type Wrapped struct {
	Recipient string `json:"recipient"` // as keys.Recipient's String has it
	Comment   string `json:"comment"`   // whose it is: at most 255 bytes
	Wrapped   []byte `json:"wrapped"`   // a binary age file
}

// KeysObject is an image's index key, wrapped for its recipients (SPEC.md
// §7.2). Its list is what the store says: nobody wraps a key for a recipient
// because he stands in it.
type KeysObject struct {
	Recipients []Wrapped `json:"recipients"`
}

// ParseKeysObject reads an index key's object.
func ParseKeysObject(b []byte) (*KeysObject, error) {
	k := &KeysObject{}
	if err := decode(k, b); err != nil {
		return nil, err
	}
	return k, nil
}

// Document gives the object's one encoding.
func (k *KeysObject) Document() ([]byte, error) { return encode(k) }

const indexKeyPrefix = "instar-index-key-1"

// WrapIndexKey encrypts the index key of the image with this index root to one
// recipient.
func WrapIndexKey(root Name, k Key, to *keys.Recipient, comment string) (Wrapped, error) {
	payload := slices.Concat([]byte(indexKeyPrefix), root[:], k[:])
	defer clear(payload)
	return wrap(payload, to, comment)
}

// IndexKey opens the entry of whichever identity has one. If none has, it is
// keys.ErrNoIdentity; a key for another index root is ErrOther.
func (k *KeysObject) IndexKey(root Name, ids ...*keys.Identity) (Key, error) {
	prefix := slices.Concat([]byte(indexKeyPrefix), root[:])
	key, err := unwrap(k.Recipients, prefix, ids)
	if err != nil {
		return Key{}, fmt.Errorf("index key for root %s: %w", root, err)
	}
	return key, nil
}

func (k *KeysObject) format() string { return "instar-keys" }
func (k *KeysObject) limit() int     { return MaxRecipientsText }
func (k *KeysObject) fields(f *form) { recipientFields(f, "recipients", &k.Recipients) }
func (k *KeysObject) check() error   { return checkRecipients("recipients", k.Recipients) }

func recipientFields(f *form, key string, list *[]Wrapped) {
	objects(f, key, list, func(w *Wrapped) {
		f.text("recipient", &w.Recipient)
		f.text("comment", &w.Comment)
		f.base64("wrapped", &w.Wrapped)
	})
}

func checkRecipients(what string, list []Wrapped) error {
	if len(list) < 1 || len(list) > MaxRecipients {
		return wrong("it has %d %s, not 1 to %d", len(list), what, MaxRecipients)
	}
	known := make(map[string]struct{}, len(list))
	for _, w := range list {
		r, err := keys.ParseRecipient(w.Recipient)
		if err != nil {
			return wrong("%s: %v", what, err)
		}
		if r.String() != w.Recipient {
			return wrong("%s: %q is not how the key is written", what, clip(w.Recipient))
		}
		if _, twice := known[w.Recipient]; twice {
			return wrong("%s: %q is listed twice", what, clip(w.Recipient))
		}
		known[w.Recipient] = struct{}{}
		if err := checkText("comment of "+clip(w.Recipient), w.Comment, 0, maxComment); err != nil {
			return err
		}
		if len(w.Wrapped) < 1 || len(w.Wrapped) > keys.MaxWrapped {
			return wrong("%s: %q has %d bytes wrapped, not 1 to %d", what, clip(w.Recipient), len(w.Wrapped), keys.MaxWrapped)
		}
	}
	return nil
}

func wrap(payload []byte, to *keys.Recipient, comment string) (Wrapped, error) {
	if err := checkText("comment of "+clip(to.String()), comment, 0, maxComment); err != nil {
		return Wrapped{}, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	b, err := keys.Wrap(payload, to)
	if err != nil {
		return Wrapped{}, err
	}
	return Wrapped{to.String(), comment, b}, nil
}

// unwrap opens the entries that are for ids until one gives 32 bytes behind
// prefix. An entry that says it is for another is not tried: the passphrase of
// its key would be asked for in vain.
func unwrap(list []Wrapped, prefix []byte, ids []*keys.Identity) (secret [32]byte, err error) {
	var failed []error
	for _, w := range list {
		for _, id := range ids {
			if id.Recipient().String() != w.Recipient {
				continue
			}
			p, err := keys.Unwrap(w.Wrapped, len(prefix)+len(secret), id)
			if err == nil {
				if !bytes.HasPrefix(p, prefix) {
					err = &Error{Class: ErrOther, Object: "what is wrapped for " + clip(w.Recipient), Detail: "it is for something else"}
				} else {
					copy(secret[:], p[len(prefix):])
					return secret, nil
				}
			}
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return secret, errors.Join(failed...)
	}
	return secret, fmt.Errorf("%w: none of %d identities is among its %d recipients", keys.ErrNoIdentity, len(ids), len(list))
}

// MaxDomain is the most bytes that a domain's document has.
const MaxDomain = MaxRecipientsText

// DomainDoc is a domain's secret, wrapped for its creators (SPEC.md §8).
type DomainDoc struct {
	Domain   string    `json:"domain"`
	Sequence int64     `json:"sequence"`
	Created  time.Time `json:"created"` // UTC, whole seconds
	Label    Label     `json:"label"`   // of the secret
	Creators []Wrapped `json:"creators"`
}

// OpenDomain verifies a domain's document and reads it. Nothing of it is used
// before.
func OpenDomain(object []byte, trust *keys.AllowedSigners, domain string) (*DomainDoc, *Verified, error) {
	d := &DomainDoc{}
	v, err := open(d, object, trust, domain)
	if err != nil {
		return nil, nil, err
	}
	return d, v, nil
}

// ParseDomain reads a domain's document, without its signature.
func ParseDomain(doc []byte) (*DomainDoc, error) {
	d := &DomainDoc{}
	if err := decode(d, doc); err != nil {
		return nil, err
	}
	return d, nil
}

// Document gives the document's one encoding. ErrUsage if a field is not as it
// must be.
func (d *DomainDoc) Document() ([]byte, error) { return encode(d) }

// Sign gives the signed document.
func (d *DomainDoc) Sign(ctx context.Context, s keys.Signer) ([]byte, error) { return sign(ctx, d, s) }

const domainSecretPrefix = "instar-domain-secret-1"

// WrapDomainSecret encrypts a domain's secret to one creator.
func WrapDomainSecret(domain string, s Secret, to *keys.Recipient, comment string) (Wrapped, error) {
	payload := slices.Concat([]byte(domainSecretPrefix+domain+"\x00"), s[:])
	defer clear(payload)
	return wrap(payload, to, comment)
}

// Secret opens the entry of whichever identity has one. If none has, it is
// keys.ErrNoIdentity; another domain's secret is ErrOther; one that the label
// is not of is ErrForeign.
func (d *DomainDoc) Secret(ids ...*keys.Identity) (Secret, error) {
	secret, err := unwrap(d.Creators, []byte(domainSecretPrefix+d.Domain+"\x00"), ids)
	if err != nil {
		return Secret{}, fmt.Errorf("secret of domain %q: %w", d.Domain, err)
	}
	if s := Secret(secret); s.Domain().Label() == d.Label {
		return s, nil
	}
	return Secret{}, bad(ErrForeign, fmt.Sprintf("secret of domain %q", d.Domain), "its label is not %s", d.Label)
}

func (d *DomainDoc) format() string             { return NamespaceDomain }
func (d *DomainDoc) limit() int                 { return MaxDomain }
func (d *DomainDoc) about() (string, time.Time) { return d.Domain, d.Created }

func (d *DomainDoc) fields(f *form) {
	f.text("domain", &d.Domain)
	f.number("sequence", &d.Sequence)
	f.time("created", &d.Created)
	label := d.Label.String()
	f.text("label", &label)
	if f.reading && f.err == nil {
		if err := d.Label.UnmarshalText([]byte(label)); err != nil {
			f.fail("%v", err)
		}
	}
	recipientFields(f, "creators", &d.Creators)
}

func (d *DomainDoc) check() error {
	if err := errors.Join(CheckDomainName(d.Domain), checkTime("created", d.Created)); err != nil {
		return err
	}
	if err := checkNumber("sequence", d.Sequence, 1, maxNumber); err != nil {
		return err
	}
	return checkRecipients("creators", d.Creators)
}
