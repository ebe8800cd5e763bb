// Package launch gives out launch tickets: the server's half of
// metadata/TICKET.md.
//
// What goes in: an instance's record and the body of its request. What comes
// out: a ticket, sealed to the request's recipient. For EC2 bundles it plays
// the cloud with the ec2 private key. It reads the image's manifest from the
// record's store, mints credentials where the record asks for it, and keeps
// how far a ticket has got in [metadata.State].
package launch

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/upload"
)

// Options say what a launcher uses. State and Keys are required.
type Options struct {
	State metadata.State
	Keys  *metadata.KeyRing
	// EC2Key is the cloud's private key, for EC2 bundles; nil refuses them.
	EC2Key *rsa.PrivateKey
	// Open opens a store; default upload.Open.
	Open func(ctx context.Context, url string, o upload.Options) (upload.Store, error)
	// Valid is how long presigned URLs are good; default one hour.
	Valid time.Duration
}

// Launcher gives out tickets. It is made by [New].
type Launcher struct {
	o       Options
	targets targets

	mu   sync.Mutex
	busy map[string]bool // instances whose claim is being answered
}

var _ metadata.Launcher = (*Launcher)(nil)

// New returns a launcher.
func New(o Options) (*Launcher, error) {
	if o.State == nil || o.Keys == nil {
		return nil, errors.New("launch tickets: a state and a key ring are needed")
	}
	if o.Open == nil {
		o.Open = upload.Open
	}
	if o.Valid == 0 {
		o.Valid = time.Hour
	}
	return &Launcher{o: o, busy: make(map[string]bool)}, nil
}

func refuse(status int, format string, a ...any) error {
	return &metadata.Refusal{Status: status, Reason: fmt.Sprintf(format, a...)}
}

// maxURLs is the most objects of an Instar image that URLs are made for: with
// about 800 bytes each they fit into a ticket.
const maxURLs = 16_000

// maxManifest is the most a bundle's manifest may have, in bytes.
const maxManifest = 8 << 20

// Claim makes the ticket, notes who has it, and returns it sealed.
func (l *Launcher) Claim(ctx context.Context, in *metadata.Instance, body []byte) ([]byte, error) {
	text, recipient, err := parse(body)
	if err != nil {
		return nil, err
	}
	// What can be refused is refused before anything is fetched or minted.
	if _, err := next(l.o.State.Live(in.ID).Ticket, in, text); err != nil {
		return nil, err
	}
	if !l.begin(in.ID) {
		return nil, refuse(http.StatusTooManyRequests, "another claim of this instance is being answered")
	}
	defer l.end(in.ID)
	t, remark, err := l.make(ctx, in)
	if err != nil {
		return nil, err
	}
	sealed, err := t.Seal(recipient)
	if err != nil {
		return nil, err
	}
	var note string
	err = l.o.State.Update(ctx, in.ID, func(live *metadata.Live) error {
		s, err := next(live.Ticket, in, text)
		if err != nil {
			return err
		}
		switch {
		case s.Renewals > 0 && s.Holder == live.Ticket.Holder && s.Launch == live.Ticket.Launch:
			note = fmt.Sprintf("launch: renewed (%d)", s.Renewals)
		case s.Claims == 1:
			note = "launch: claimed"
		default:
			note = fmt.Sprintf("launch: claimed again (%d)", s.Claims)
		}
		live.Ticket = s
		return nil
	})
	if err != nil {
		return nil, err
	}
	if remark != "" {
		note += "; " + remark
	}
	metadata.Note(ctx, note)
	return sealed, nil
}

// begin notes that a claim of the instance is being answered, which costs the
// store and the STS something; false if one is already.
func (l *Launcher) begin(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[id] {
		return false
	}
	l.busy[id] = true
	return true
}

func (l *Launcher) end(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.busy, id)
}

// Complete withdraws the ticket.
func (l *Launcher) Complete(ctx context.Context, in *metadata.Instance, body []byte) error {
	text, _, err := parse(body)
	if err != nil {
		return err
	}
	note := "launch: completed"
	err = l.o.State.Update(ctx, in.ID, func(live *metadata.Live) error {
		s := live.Ticket
		switch {
		case s.Launch != in.LaunchID() || s.Holder != digest(text):
			return refuse(http.StatusConflict, "only who holds the ticket can complete it")
		case s.Completed:
			note = "launch: completed already"
		}
		live.Ticket.Completed = true
		return nil
	})
	if err == nil {
		metadata.Note(ctx, note)
	}
	return err
}

// parse reads a request, or refuses it.
func parse(body []byte) (holder string, to age.Recipient, err error) {
	if holder, to, err = ticket.ParseRequest(body); err != nil {
		return "", nil, refuse(http.StatusBadRequest, "%v", err)
	}
	return holder, to, nil
}

// next is the state after a claim by the recipient, or the refusal.
func next(s metadata.TicketState, in *metadata.Instance, recipient string) (metadata.TicketState, error) {
	if id := in.LaunchID(); s.Launch != id {
		s = metadata.TicketState{Launch: id}
	}
	holder := digest(recipient)
	switch {
	case s.Completed:
		return s, refuse(http.StatusGone, "the ticket was completed or withdrawn")
	case s.Claims > 0 && s.Holder == holder:
		s.Renewals++
	case s.Claims > in.Launch.Reclaims:
		return s, refuse(http.StatusForbidden, "the ticket was claimed too often (%d times)", s.Claims)
	default:
		s.Claims++
		s.Holder = holder
	}
	return s, nil
}

// digest names a recipient.
func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:16])
}

// make assembles the ticket. remark is for the log.
func (l *Launcher) make(ctx context.Context, in *metadata.Instance) (t *ticket.Ticket, remark string, err error) {
	r := in.Launch
	t = &ticket.Ticket{
		Version: ticket.Version, InstanceID: in.ID, Format: r.Format, Mode: ticket.Mode(r.Mode), Cache: r.Cache, Store: r.Store, Endpoint: r.Endpoint, Region: r.Region,
		CACert: r.CACert, Manifest: r.Manifest, ManifestSHA256: r.ManifestSHA256,
	}
	now := time.Now()
	t.Expires = now.Add(l.o.Valid).UTC().Truncate(time.Second)
	var creds *metadata.StaticKeys
	if c := &r.Credentials; c.Static != nil || c.File != "" || c.STS != nil {
		k, _, err := l.o.Keys.Get(ctx, in.ID, c, now)
		if err != nil {
			return nil, "", err
		}
		creds = &k
		if k.Expiration.Before(t.Expires) {
			t.Expires = k.Expiration.UTC()
		}
		if c.STS != nil {
			// Long-lived keys are used for signing URLs only; these go along.
			t.Credentials = &ticket.Credentials{AccessKeyID: k.AccessKeyID, SecretAccessKey: k.SecretAccessKey, SessionToken: k.Token, Expiration: k.Expiration.UTC()}
		}
	}
	store, err := l.open(ctx, r, creds)
	if err != nil {
		return nil, "", err
	}
	defer store.Close()
	if r.Format == "instar" {
		t.Signers, t.IndexKey = r.Signers, r.IndexKey
		names, remark, err := l.objects(ctx, store, t)
		if err != nil {
			return nil, "", err
		}
		return t, remark, l.presign(ctx, store, t, names...)
	}
	m, err := l.unwrap(ctx, store, t, r)
	if err != nil {
		return nil, "", err
	}
	names := []string{r.Manifest}
	for _, p := range m.Parts {
		names = append(names, path.Join(path.Dir(r.Manifest), p.Filename))
	}
	return t, "", l.presign(ctx, store, t, names...)
}

func (l *Launcher) open(ctx context.Context, r *metadata.Launch, k *metadata.StaticKeys) (upload.Store, error) {
	o := upload.Options{Endpoint: r.Endpoint, Region: r.Region}
	if k != nil {
		o.Credentials = &upload.Credentials{AccessKeyID: k.AccessKeyID, SecretAccessKey: k.SecretAccessKey, SessionToken: k.Token}
	}
	if r.CACert != "" {
		f, err := os.CreateTemp("", "instar-ca")
		if err != nil {
			return nil, fmt.Errorf("opening the image's store: %w", err)
		}
		defer os.Remove(f.Name())
		_, err = f.WriteString(r.CACert)
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("opening the image's store: %w", err)
		}
		o.CACertFile = f.Name()
	}
	s, err := l.o.Open(ctx, r.Store, o)
	if err != nil {
		return nil, fmt.Errorf("opening the image's store: %w", err)
	}
	return s, nil
}

// unwrap reads the manifest, checks it against the record and opens its key.
func (l *Launcher) unwrap(ctx context.Context, store upload.Store, t *ticket.Ticket, r *metadata.Launch) (*ec2.Manifest, error) {
	if l.o.EC2Key == nil {
		return nil, errors.New("EC2 bundles cannot be launched: the server has no ec2 private key (--ec2-key)")
	}
	cert, err := keys.ParseCertificate([]byte(r.Certificate))
	if err != nil {
		return nil, fmt.Errorf("the record's launch.certificate: %w", err)
	}
	pub, err := keys.PublicKey(cert)
	if err != nil {
		return nil, fmt.Errorf("the record's launch.certificate: %w", err)
	}
	data, _, err := upload.GetBytes(ctx, store, r.Manifest, maxManifest)
	if err != nil {
		return nil, fmt.Errorf("reading the image's manifest: %w", err)
	}
	sum := sha256.Sum256(data)
	t.ManifestSHA256 = hex.EncodeToString(sum[:])
	if r.ManifestSHA256 != "" && r.ManifestSHA256 != t.ManifestSHA256 {
		return nil, refuse(http.StatusForbidden, "the manifest in the store is not the record's: its SHA-256 is %s", t.ManifestSHA256)
	}
	m, err := ec2.ParseManifest(data)
	if err != nil {
		return nil, refuse(http.StatusForbidden, "the manifest is not valid: %v", err)
	}
	key, iv, err := m.Unwrap(l.o.EC2Key, ec2.Trust{Keys: []*rsa.PublicKey{pub}})
	if err != nil {
		return nil, refuse(http.StatusForbidden, "the manifest %s is not for this launch: %v", r.Manifest, err)
	}
	t.ManifestBytes, t.Certificate = data, r.Certificate
	t.Key, t.IV = hex.EncodeToString(key[:]), hex.EncodeToString(iv[:])
	return m, nil
}

// objects lists what an Instar image is made of, and what became of that, if
// URLs are to be made of it. Who signed the manifest is for the instance to judge;
// that it is the one of the record is seen to here.
func (l *Launcher) objects(ctx context.Context, store upload.Store, t *ticket.Ticket) (names []string, remark string, err error) {
	if _, ok := store.(upload.Presigner); !ok || t.Credentials != nil {
		return []string{t.Manifest}, "", nil
	}
	data, _, err := upload.GetBytes(ctx, store, t.Manifest, chunked.MaxSigned)
	if err != nil {
		return nil, "", fmt.Errorf("reading the image's manifest: %w", err)
	}
	n := chunked.NameOf(data)
	if n.String() != t.ManifestSHA256 {
		return nil, "", refuse(http.StatusForbidden, "the manifest in the store is not the record's: its SHA-256 is %s", n)
	}
	m, err := chunked.ReadManifestUnverified(data)
	if err != nil {
		return nil, "", refuse(http.StatusForbidden, "the manifest is not valid: %v", err)
	}
	moved, remark, err := l.moved(ctx, store, m.Packs)
	if err != nil {
		return nil, "", err
	}
	count := 4 + len(m.Index.Segments) + len(m.Packs) + len(moved)
	if count > maxURLs {
		return nil, "", fmt.Errorf("the image has %d objects, more than the %d that a ticket has URLs for: give launch.credentials.sts", count, maxURLs)
	}
	names = append(make([]string, 0, count), t.Manifest, chunked.KeysKey(m.Name, n), chunked.TraceKey(m.Name, n), chunked.IndexObjectKey(m.Index.Root.Name))
	for _, o := range m.Index.Segments {
		names = append(names, chunked.IndexObjectKey(o.Name))
	}
	for _, o := range m.Packs {
		names = append(names, chunked.PackKey(o.Name))
	}
	return append(names, moved...), remark, nil
}

// presign adds URLs for the objects, where the ticket has no credentials and
// the store can make them.
func (l *Launcher) presign(ctx context.Context, store upload.Store, t *ticket.Ticket, names ...string) error {
	if t.Credentials != nil {
		return nil
	}
	p, ok := store.(upload.Presigner)
	if !ok {
		if u, err := url.Parse(t.Store); err == nil && u.Scheme == "file" {
			return nil
		}
		return fmt.Errorf("the store %s can make no presigned URLs: give launch.credentials.sts", t.Store)
	}
	t.Objects = make(map[string]string, len(names))
	for _, name := range names {
		u, err := p.PresignGet(ctx, name, time.Until(t.Expires))
		if err != nil {
			return fmt.Errorf("signing the URL of %s: %w", name, err)
		}
		t.Objects[name] = u
	}
	return nil
}
