package images

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// Domain is a domain whose secret is open: the images that share chunks.
type Domain struct {
	*chunked.Domain
	Name     string
	Creators []Recipient // as the store says
	Made     bool        // by this call
}

// Recipient is somebody something was wrapped for, as the store says.
type Recipient struct {
	Key     string // age1…, ssh-ed25519 …, ssh-rsa …
	Comment string
}

// DomainOptions says how a domain that does not exist is made.
type DomainOptions struct {
	Create   bool              // make it if it does not exist; else that is [ErrNoImage]
	Creators []*keys.Recipient // who may add images to a new one, this machine among them
	Signer   keys.Signer       // of a new one
}

// Domain opens a domain for a creator, with the identities of [Options]. The
// label is remembered: another secret in the place of one that was seen is
// [ErrLabel].
func (s *Store) Domain(ctx context.Context, name string, o DomainOptions) (*Domain, error) {
	d, err := s.domain(ctx, name, o)
	if err != nil {
		return nil, fmt.Errorf("domain %q in %s: %w", name, s, err)
	}
	return d, nil
}

func (s *Store) domain(ctx context.Context, name string, o DomainOptions) (*Domain, error) {
	if err := chunked.CheckDomainName(name); err != nil {
		return nil, err
	}
	made := false
	for range maxTries {
		doc, _, err := s.readDomain(ctx, name)
		if err != nil {
			return nil, err
		}
		if doc != nil {
			d, err := s.openDomain(doc)
			if d != nil {
				d.Made = made
			}
			return d, err
		}
		if !o.Create {
			return nil, fmt.Errorf("%w: nothing was captured into it yet", ErrNoImage)
		}
		made = true
		if err := s.makeDomain(ctx, name, o); errors.Is(err, upload.ErrExist) {
			made = false
		} else if err != nil {
			return nil, err
		}
	}
	return nil, ErrBusy
}

// readDomain reads and verifies a domain's document; nil if there is none.
func (s *Store) readDomain(ctx context.Context, name string) (*chunked.DomainDoc, string, error) {
	if s.opt.Trust == nil {
		return nil, "", ErrNoTrust
	}
	b, o, err := s.get(ctx, chunked.DomainKey(name), maxDomain)
	if errors.Is(err, upload.ErrNotExist) {
		if seen, ok, merr := s.memory.seenLabel(name); merr != nil || ok {
			return nil, "", errors.Join(merr, fmt.Errorf("%w: it is gone, label %s was seen", ErrLabel, seen))
		}
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	doc, _, err := chunked.OpenDomain(b, s.opt.Trust, name)
	if err != nil {
		return nil, "", err
	}
	return doc, o.ETag, s.memory.label(name, doc.Label)
}

func (s *Store) openDomain(doc *chunked.DomainDoc) (*Domain, error) {
	secret, err := doc.Secret(s.opt.Identities...)
	if err != nil {
		return nil, err
	}
	d := &Domain{Domain: secret.Domain(), Name: doc.Domain}
	for _, c := range doc.Creators {
		d.Creators = append(d.Creators, Recipient{c.Recipient, c.Comment})
	}
	return d, nil
}

func (s *Store) makeDomain(ctx context.Context, name string, o DomainOptions) error {
	if len(o.Creators) == 0 {
		return errors.New("make it: no creator is given")
	}
	secret, err := chunked.NewSecret()
	if err != nil {
		return err
	}
	doc := &chunked.DomainDoc{Domain: name, Sequence: 1, Created: s.stamp(), Label: secret.Domain().Label()}
	for _, r := range o.Creators {
		if err := addCreator(doc, secret, r); err != nil {
			return err
		}
	}
	return s.putDomain(ctx, doc, o.Signer, "")
}

func (s *Store) putDomain(ctx context.Context, doc *chunked.DomainDoc, signer keys.Signer, etag string) error {
	data, err := doc.Sign(ctx, signer)
	if err != nil {
		return err
	}
	if _, _, err := chunked.OpenDomain(data, s.opt.Trust, doc.Domain); err != nil {
		return fmt.Errorf("the signing key is not one this machine trusts for the domain: %w", err)
	}
	return s.putIf(ctx, chunked.DomainKey(doc.Domain), data, etag)
}

// AddCreator lets another key add images to a domain. An identity of this
// store's must be among its creators already.
func (s *Store) AddCreator(ctx context.Context, domain string, r *keys.Recipient, signer keys.Signer) error {
	return s.changeDomain(ctx, domain, signer, func(doc *chunked.DomainDoc) (bool, error) {
		if has(doc.Creators, r.String()) {
			return false, nil
		}
		secret, err := doc.Secret(s.opt.Identities...)
		if err != nil {
			return false, err
		}
		return true, addCreator(doc, secret, r)
	})
}

// RemoveCreator takes a key (as [Domain] lists it) out of a domain's
// document. What that creator learned it knows for ever.
func (s *Store) RemoveCreator(ctx context.Context, domain, recipient string, signer keys.Signer) error {
	return s.changeDomain(ctx, domain, signer, func(doc *chunked.DomainDoc) (bool, error) {
		before := len(doc.Creators)
		doc.Creators = slices.DeleteFunc(doc.Creators, func(w chunked.Wrapped) bool { return w.Recipient == recipient })
		if len(doc.Creators) == 0 {
			return false, fmt.Errorf("the last creator stays: %w", ErrLast)
		}
		return len(doc.Creators) != before, nil
	})
}

func (s *Store) changeDomain(ctx context.Context, name string, signer keys.Signer, change func(*chunked.DomainDoc) (bool, error)) error {
	for range maxTries {
		doc, etag, err := s.readDomain(ctx, name)
		if err == nil && doc == nil {
			err = ErrNoImage
		}
		changed := false
		if err == nil {
			changed, err = change(doc)
		}
		if err != nil {
			return fmt.Errorf("change the creators of domain %q in %s: %w", name, s, err)
		}
		if !changed {
			return nil
		}
		doc.Sequence++
		doc.Created = s.stamp()
		err = s.putDomain(ctx, doc, signer, etag)
		if err == nil {
			return nil
		}
		if !errors.Is(err, upload.ErrExist) {
			return fmt.Errorf("change the creators of domain %q in %s: %w", name, s, err)
		}
	}
	return fmt.Errorf("change the creators of domain %q in %s: %w", name, s, ErrBusy)
}

func addCreator(doc *chunked.DomainDoc, secret chunked.Secret, r *keys.Recipient) error {
	if has(doc.Creators, r.String()) {
		return nil
	}
	w, err := chunked.WrapDomainSecret(doc.Domain, secret, r, r.Comment())
	if err != nil {
		return err
	}
	doc.Creators = append(doc.Creators, w)
	return nil
}
