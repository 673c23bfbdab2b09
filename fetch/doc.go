// Package fetch gets firmware over HTTP from where it may come from, and from
// nowhere else.
//
// The URL of an update mostly comes from outside, from whoever may call
// OTA.Update. A device stands where that caller often does not: inside of a
// network, beside services that trust their neighbours. A [Policy] keeps it from
// being used as a relay (server-side request forgery, CWE-918).
//
//	policy := &fetch.Policy{Hosts: []string{"updates.example.com"}}
//	client := policy.Client()
//	res, err := fetch.Do(client, req)
//
// What is refused unless the Policy names it: plain HTTP; hosts that are not
// listed, if any are; addresses that are not public. Addresses are checked when
// they are dialled, after the name was looked up, so that a name server that
// changes its answers achieves nothing. Each redirect obeys the same rules.
package fetch
