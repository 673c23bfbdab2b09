// Package fetch gets firmware over HTTP from where it may come from, and from
// nowhere else; and gets on with it when a connection breaks.
//
// The URL of an update mostly comes from outside, from whoever may call
// OTA.Update. A device stands where that caller often does not: inside of a
// network, beside services that trust their neighbours. A [Policy] keeps it from
// being used as a relay (server-side request forgery, CWE-918).
//
//	policy := &fetch.Policy{Hosts: []string{"updates.example.com"}}
//	f, err := fetch.Open(ctx, rawURL, &fetch.Options{Policy: policy})
//	…
//	r, err := f.Stream(ctx)
//
// What is refused unless the Policy names it: plain HTTP; hosts that are not
// listed, if any are; addresses that are not public. Addresses are checked when
// they are dialled, after the name was looked up, so that a name server that
// changes its answers achieves nothing. Each redirect obeys the same rules.
//
// # Downloads
//
// A [File] is read from its beginning, or range by range where the server can do
// that (RFC 9110, section 14): whoever knows what the device has already downloads
// the rest only. It asks for exact ranges, over connections that are kept. What
// breaks, stalls or is answered by an overloaded server is asked for again, from
// the byte on that is due, after growing delays and for a limited time; see
// [Options].
//
// No part of one file is ever followed by a part of another, as far as the server
// lets that be known: by an ETag or Last-Modified in each answer, If-Range with
// strong ones, the size. Where it does not, the digests of a bundle do.
// Compressed transfer, parts that were not asked for and answers that contradict
// themselves are refused.
//
// Proxies are used if [Policy] names them, cookies never. Headers that the caller
// adds go to the origin of the URL only. [Device] adds those by which servers for
// Mongoose OS know a device.
package fetch
