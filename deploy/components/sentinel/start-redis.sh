#!/bin/sh
# Starts as what the sentinels say it is. Where none knows, the first pod is the master.
set -eu
umask 077
me=$POD_NAME.redis
master=$(timeout 5 redis-cli -h redis-sentinel -p 26379 --raw SENTINEL get-master-addr-by-name redismaster | head -n 1) || true
case $master in
redis-*.redis) ;;
*) master=redis-0.redis ;;
esac
{ # one file that Sentinel may rewrite
  cat /etc/redis/redis.conf
  echo "requirepass $REDISCLI_AUTH"
  echo "masterauth $REDISCLI_AUTH"
  echo "replica-announce-ip $me" # a name: addresses change with every restart
  [ "$master" = "$me" ] || echo "replicaof $master 6379"
} >/run/redis/redis.conf
exec redis-server /run/redis/redis.conf
