package ticket

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"filippo.io/age"
)

// ParseRequest reads the body of a request, as who answers it does: whom the
// ticket is for, by name and to [Ticket.Seal] it. An error shows nothing of the
// body.
func ParseRequest(body []byte) (holder string, to age.Recipient, err error) {
	var q Request
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&q); err != nil || dec.More() {
		return "", nil, errors.New("the body is not a ticket request")
	}
	if q.Version != Version {
		return "", nil, fmt.Errorf("version %d of ticket requests is not known", q.Version)
	}
	if x, err := age.ParseX25519Recipient(q.Recipient); err == nil {
		return x.String(), x, nil
	}
	if pq, err := age.ParseHybridRecipient(q.Recipient); err == nil {
		return pq.String(), pq, nil
	}
	return "", nil, errors.New("the recipient is not an age recipient (age1… or age1pq1…)")
}

// Seal makes the answer to a claim: the ticket, for the recipient's eyes.
func (t *Ticket) Seal(to age.Recipient) ([]byte, error) {
	plain, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("making the ticket: %w", err)
	}
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, to)
	if err == nil {
		_, err = w.Write(plain)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("sealing the ticket: %w", err)
	}
	return sealed.Bytes(), nil
}
