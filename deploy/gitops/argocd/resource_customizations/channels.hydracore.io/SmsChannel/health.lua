-- The condition that decides also gives the message. status.observedGeneration is -1 until the first reconcile.
local conditions = {}
if obj.status ~= nil and obj.status.conditions ~= nil then
  for _, condition in ipairs(obj.status.conditions) do
    conditions[condition.type] = condition
  end
end

local function is_true(condition)
  return condition ~= nil and condition.status == "True"
end

local function health(status, condition)
  return { status = status, message = condition.message }
end

local ready, reconciling, stalled = conditions["Ready"], conditions["Reconciling"], conditions["Stalled"]
local observed = obj.status ~= nil and obj.status.observedGeneration == obj.metadata.generation

if observed and ready ~= nil and ready.reason == "Suspended" then
  return health("Suspended", ready)
end
if observed and is_true(stalled) then
  return health("Degraded", stalled)
end
if is_true(reconciling) then
  return health("Progressing", reconciling)
end
if observed and is_true(ready) then
  return health("Healthy", ready)
end
if observed and ready ~= nil then
  return health("Progressing", ready)
end
return { status = "Progressing", message = "Waiting for the operator to reconcile the current generation" }
