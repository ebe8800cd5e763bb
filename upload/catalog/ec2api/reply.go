package ec2api

import (
	"bytes"
	"crypto/rand"
	"encoding/xml"
	"fmt"
	"strconv"
	"time"
)

// head begins every answer of EC2.
type head struct {
	RequestID string `xml:"requestId"`
}

func (h *head) setRequestID(id string) { h.RequestID = id }

// reply is an answer: a struct that embeds head and whose fields' tags name the
// elements.
type reply interface{ setRequestID(id string) }

// returned is the answer of actions that only say that they were done. Clients
// of old look at it.
type returned struct {
	head
	Return bool `xml:"return"`
}

func done() *returned { return &returned{Return: true} }

// items is a list, whose element is there even if it is empty.
type items[T any] struct {
	Item []T `xml:"item"`
}

// listOf makes a list.
func listOf[T any](v []T) items[T] { return items[T]{v} }

// someOf makes a list that is absent if it is empty.
func someOf[T any](v []T) *items[T] {
	if len(v) == 0 {
		return nil
	}
	return &items[T]{v}
}

// value is a text in an element of its own, as attributes are.
type value struct {
	Value string `xml:"value,omitempty"`
}

// timestamp is a time as EC2 writes it, "" for none.
func timestamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z")
}

// newRequestID makes a UUID.
func newRequestID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// encode writes an answer's document. Characters that XML does not have become
// U+FFFD.
func encode(action, namespace string, out any) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(xml.Header)
	e := xml.NewEncoder(&b)
	start := xml.StartElement{Name: xml.Name{Local: action + "Response"}, Attr: []xml.Attr{{Name: xml.Name{Local: "xmlns"}, Value: namespace}}}
	if err := e.EncodeElement(out, start); err != nil {
		return nil, fmt.Errorf("writing the answer to %s: %w", action, err)
	}
	return b.Bytes(), e.Close()
}

// ec2Error is the document of a refusal.
type ec2Error struct {
	XMLName xml.Name `xml:"Response"`
	Errors  []struct {
		Code    string
		Message string
	} `xml:"Errors>Error"`
	RequestID string
}

type stsError struct {
	XMLName xml.Name `xml:"https://sts.amazonaws.com/doc/2011-06-15/ ErrorResponse"`
	Error   struct {
		Type    string
		Code    string
		Message string
	}
	RequestID string `xml:"RequestId"`
}

func encodeError(service, code, message, id string) []byte {
	var doc any
	if service == serviceSTS {
		d := stsError{RequestID: id}
		d.Error.Type, d.Error.Code, d.Error.Message = "Sender", code, message
		doc = d
	} else {
		d := ec2Error{RequestID: id}
		d.Errors = append(d.Errors, struct {
			Code    string
			Message string
		}{code, message})
		doc = d
	}
	out, err := xml.Marshal(doc)
	if err != nil { // strings always marshal
		return nil
	}
	return append([]byte(xml.Header), out...)
}

// percent is a progress as EC2 writes it.
func percent(n int) string { return strconv.Itoa(n) + "%" }
