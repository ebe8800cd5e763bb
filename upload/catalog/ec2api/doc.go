// Package ec2api speaks the EC2 Query API over a catalog, so that awscli, the
// AWS SDKs and Packer work against it.
//
// What goes in: HTTP requests signed with Signature Version 4, accounts with
// their access keys, a [catalog.Catalog]. What comes out: an [http.Handler]
// whose answers those clients parse, and a [Record] of each request for whoever
// logs and counts. The package keeps no state: any number of servers may stand
// over one bucket. It touches what the catalog touches and, for bundling, the
// tasks below catalog/tasks/ of the store.
//
// Names of actions, parameters and elements are those of the model of EC2's API
// version 2016-11-15; docs/catalog.md lists what is supported. Of what a caller
// may not see, nothing tells that it exists: the answer is the one for an id
// that was never given out.
package ec2api
